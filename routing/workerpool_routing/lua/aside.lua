-- Set aside what nobody can read: the message leaves the in-flight keys, the ledger entry its name, and both are kept for people.
--
-- KEYS: job, unacked hash, unacked index, aside, aside:count, aside:at. ARGV: task id, delivery tag, reason, the message, how many are
-- kept: the last of them.
-- Returns 1; a second caller only writes the same again.
local entry = redis.call('TYPE', KEYS[1]).ok
local kept = {}
if entry == 'hash' then
  for i, text in ipairs(redis.call('HGETALL', KEYS[1])) do kept[i] = text end
elseif entry == 'string' then
  kept[1] = redis.call('GET', KEYS[1])
end
local clock = redis.call('TIME')
local record = {reason = ARGV[3], message = ARGV[4], entry = kept, at = clock[1] * 1000 + math.floor(clock[2] / 1000)}
redis.call('HSET', KEYS[4], ARGV[1], cjson.encode(record))
redis.call('ZADD', KEYS[6], record.at, ARGV[1])
for _, oldest in ipairs(redis.call('ZRANGE', KEYS[6], 0, -1 - ARGV[5])) do
  redis.call('HDEL', KEYS[4], oldest)
  redis.call('ZREM', KEYS[6], oldest)
end
redis.call('INCR', KEYS[5])
redis.call('DEL', KEYS[1])
redis.call('HDEL', KEYS[2], ARGV[2])
redis.call('ZREM', KEYS[3], ARGV[2])
return 1
