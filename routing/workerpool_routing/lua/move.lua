-- Give a claimed job another run: take its message out of the in-flight keys and put the rewritten one at the head of a queue.
-- Whoever sees the failure or the loss calls this; one caller wins, the others change nothing.
--
-- tag, held_as: the delivery tag on the ledger, and the one in the in-flight keys. is_loss: 1 when it counts as a loss on a tier
-- that it cannot leave (which is allowed once). attempts, checkpoint, served: of the tier that it leaves. list, waiting: of the
-- one it goes to.
-- Returns 1 when it moved, 0 when another caller, or the attempt itself, was first.
local job, held, unacked, index, list, routes, waiting, attempts, checkpoint, served, outlier = unpack(KEYS)
local id, attempt, tag, held_as, next_attempt, tier, reason, is_loss, message, wake, pool, life, queue, how, raised = unpack(ARGV)
local state, latest, claimed_as, runs, claimed_at =
  unpack(redis.call('HMGET', job, 'state', 'attempt', 'tag', 'runs', 'claimed_at'))
if state ~= 'claimed' and state ~= 'finishing' then return 0 end
if latest ~= attempt or claimed_as ~= tag then return 0 end
if redis.call('HDEL', unacked, held_as) == 0 then return 0 end
redis.call('ZREM', index, held_as)
redis.call('HDEL', job, 'tag', 'owner')
if next_attempt ~= attempt then
  redis.call('HDEL', job, 'left')
  -- The tier is suspected until it is known how the job ends elsewhere. What was finishing has been counted: it ended well here.
  local began = tonumber(claimed_at) or 0
  if state == 'claimed' and count_attempt(attempts, checkpoint, began, 'failed', life) then
    redis.call('HSET', job, 'suspect', attempts, 'suspect_since', began, 'suspect_worker', outlier)
    redis.call('HSETNX', outlier, 'beside', redis.call('HGET', served, 'succeeded') or 0)
    -- A worker that was ejected and is tried again has failed again.
    if now >= (tonumber(redis.call('HGET', outlier, 'till')) or math.huge) then redis.call('HSET', outlier, 'again', 1) end
    redis.call('EXPIRE', outlier, life)
  end
end
redis.call('HSET', job, 'state', 'admitted', 'attempt', next_attempt, 'tier', tier, 'reason', reason, 'message', message,
  'queue', queue)
if is_loss == '1' then redis.call('HINCRBY', job, 'losses', 1) end
redis.call('EXPIRE', job, life)
end_run(job, runs, how, raised)
redis.call('SREM', held, id)
redis.call('RPUSH', list, message)
redis.call('ZADD', waiting, now, id)
redis.call('HINCRBY', routes, tier .. ':' .. reason, 1)
redis.call('PUBLISH', wake, pool)
return 1
