-- Put a message that is in flight back at the head of its queue, under a fresh delivery tag; the state on the ledger stays.
-- Of several callers one wins.
--
-- KEYS: unacked hash, unacked index, queue list, job, waiting:<tier>. ARGV: delivery tag, the message, queue, task id, attempt, tier,
-- retries that the message has had, 1 when it may be in no key because its worker could not record it.
-- Returns 1 when it was put back, 0 when it is no longer in flight under that tag.
redis.call('ZREM', KEYS[2], ARGV[1])
if redis.call('HDEL', KEYS[1], ARGV[1]) == 0 and ARGV[8] ~= '1' then return 0 end
redis.call('RPUSH', KEYS[3], ARGV[2])
-- Whoever takes it next may die before recording it: then the sweep publishes it again from the ledger.
-- The copy of an earlier attempt or retry, or of a job that has moved to another tier, says nothing about the one that counts.
if redis.call('TYPE', KEYS[4]).ok ~= 'hash' then return 1 end
local job = redis.call('HMGET', KEYS[4], 'state', 'attempt', 'left', 'retries')
local left = string.find(' ' .. (job[3] or '') .. ' ', ' ' .. ARGV[6] .. ' ', 1, true)
if (job[1] == 'admitted' or job[1] == 'finishing') and job[2] == ARGV[5] and not left
  and (tonumber(job[4]) or 0) <= tonumber(ARGV[7]) then
  redis.call('HSET', KEYS[4], 'message', ARGV[2], 'queue', ARGV[3])
  redis.call('ZADD', KEYS[5], 'GT', redis.call('TIME')[1] * 1000, ARGV[4])
end
return 1
