-- The task's code has asked for another run: its job waits again, if this attempt is still the one that the ledger knows.
--
-- retries: how many retries the code has asked for by now; '' when it has rejected the message, which is then delivered once
-- more. message, queue: the retry's, for the sweep; message is '' if the sweep cannot publish it again. later: in how many seconds
-- it is due.
-- Returns 1 when the job waits, or is no longer known; 0 when another attempt owns it now.
local job, held, waiting = unpack(KEYS)
local id, attempt, tag, owner, life, how, retries, message, queue, later = unpack(ARGV)
local state, latest, claimed_as, claimed_by, runs = unpack(redis.call('HMGET', job, 'state', 'attempt', 'tag', 'owner', 'runs'))
if state and (state ~= 'claimed' or latest ~= attempt or claimed_as ~= tag or claimed_by ~= owner) then return 0 end
redis.call('SREM', held, id)
if not state then return 1 end
redis.call('HSET', job, 'state', 'admitted', 'admitted_at', now)
redis.call('HDEL', job, 'tag', 'owner')
redis.call('EXPIRE', job, life + later)
end_run(job, runs, how, '')
if retries ~= '' then
  redis.call('HSET', job, 'retries', retries)
  redis.call('HDEL', job, 'left')
end
if message ~= '' then
  redis.call('HSET', job, 'message', message, 'queue', queue)
  redis.call('ZADD', waiting, now + 1000 * later, id)
end
return 1
