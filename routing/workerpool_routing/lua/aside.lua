-- Set aside what nobody can read: the message leaves the in-flight keys, the ledger entry its name, and both are kept for people.
--
-- most: how many are kept: the last of them.
-- Returns 1; a second caller only writes the same again.
local job, unacked, index, aside, aside_count, aside_at = unpack(KEYS)
local id, tag, reason, message, most = unpack(ARGV)
local kind = redis.call('TYPE', job).ok
local entry = {}
if kind == 'hash' then entry = redis.call('HGETALL', job) end
if kind == 'string' then entry = {redis.call('GET', job)} end
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
redis.call('HSET', aside, id, cjson.encode({reason = reason, message = message, entry = entry, at = now}))
redis.call('ZADD', aside_at, now, id)
for _, oldest in ipairs(redis.call('ZRANGE', aside_at, 0, -1 - most)) do
  redis.call('HDEL', aside, oldest)
  redis.call('ZREM', aside_at, oldest)
end
redis.call('INCR', aside_count)
redis.call('DEL', job)
redis.call('HDEL', unacked, tag)
redis.call('ZREM', index, tag)
return 1
