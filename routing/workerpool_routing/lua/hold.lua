-- A worker has taken a message: it is in flight from now on, by Redis's clock and not the host's.
--
-- KEYS: unacked hash, unacked index. ARGV: delivery tag, value.
local clock = redis.call('TIME')
redis.call('ZADD', KEYS[2], clock[1] .. '.' .. string.format('%06d', clock[2]), ARGV[1])
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
return 1
