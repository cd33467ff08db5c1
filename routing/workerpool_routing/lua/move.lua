-- Give a claimed job another run: take its message out of the in-flight keys and put the rewritten one at the head of a queue.
-- Whoever sees the failure or the loss calls this; one caller wins, the others change nothing.
--
-- KEYS: job, held:<owner>, unacked hash, unacked index, queue list, routes.
-- ARGV: task id, attempt, delivery tag on the ledger, delivery tag in the in-flight keys, new attempt, new tier, reason,
-- 1 when it stays on its tier (which is allowed once), the message, wake channel, pool, life.
-- Returns 1 when it moved, 0 when another caller, or the attempt itself, was first.
local job = redis.call('HMGET', KEYS[1], 'state', 'attempt', 'tag')
if job[1] ~= 'claimed' and job[1] ~= 'finishing' then return 0 end
if job[2] ~= ARGV[2] or job[3] ~= ARGV[3] then return 0 end
if redis.call('HDEL', KEYS[3], ARGV[4]) == 0 then return 0 end
redis.call('ZREM', KEYS[4], ARGV[4])
redis.call('HDEL', KEYS[1], 'tag', 'owner')
redis.call('HSET', KEYS[1], 'state', 'admitted', 'attempt', ARGV[5], 'tier', ARGV[6], 'reason', ARGV[7])
if ARGV[8] == '1' then redis.call('HINCRBY', KEYS[1], 'losses', 1) end
redis.call('EXPIRE', KEYS[1], ARGV[12])
redis.call('SREM', KEYS[2], ARGV[1])
redis.call('RPUSH', KEYS[5], ARGV[9])
redis.call('HINCRBY', KEYS[6], ARGV[6] .. ':' .. ARGV[7], 1)
redis.call('PUBLISH', ARGV[10], ARGV[11])
return 1
