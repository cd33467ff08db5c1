-- A worker has taken a message: it is in flight from now on, by Redis's clock and not the host's.
--
-- value: JSON, [the message, "", its queue], as Kombu keeps it.
local unacked, index = unpack(KEYS)
local tag, value = unpack(ARGV)
local clock = redis.call('TIME')
redis.call('ZADD', index, clock[1] .. '.' .. string.format('%06d', clock[2]), tag)
redis.call('HSET', unacked, tag, value)
