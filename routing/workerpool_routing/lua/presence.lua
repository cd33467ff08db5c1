-- A worker says that it is there, and renews every message that it holds.
--
-- KEYS: presence:<tier>, slots:<tier>, unacked index. ARGV: the report as JSON without its times, life of the keys in seconds,
-- then the delivery tags that the worker holds.
-- Messages with a future ETA are held too; without renewal Kombu would hand them to other workers after the visibility time-out.
local report = cjson.decode(ARGV[1])
local life = tonumber(ARGV[2])
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)

local before = redis.call('HGET', KEYS[1], report.owner)
report.since = before and cjson.decode(before).since or now
report.at = now
redis.call('HSET', KEYS[1], report.owner, cjson.encode(report))

local had = before and cjson.decode(before).slots or 0
for n = 0, report.slots - 1 do redis.call('ZADD', KEYS[2], now, report.owner .. '/' .. n) end
for n = report.slots, had - 1 do redis.call('ZREM', KEYS[2], report.owner .. '/' .. n) end
for i = 3, #ARGV do redis.call('ZADD', KEYS[3], 'XX', clock[1] .. '.' .. string.format('%06d', clock[2]), ARGV[i]) end

-- Without an operator nobody takes over from the lost: forget them after a while.
for _, slot in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now - life * 1000)) do
  redis.call('ZREM', KEYS[2], slot)
  redis.call('HDEL', KEYS[1], string.match(slot, '^(.*)/%d+$'))
end
redis.call('EXPIRE', KEYS[1], life)
redis.call('EXPIRE', KEYS[2], life)
return now
