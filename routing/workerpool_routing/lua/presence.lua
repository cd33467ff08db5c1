-- A worker says that it is there, and renews every message that it holds.
--
-- KEYS: presence:<tier>, slots:<tier>, unacked index, scheduled:<tier>, drain, served:<tier>, outlier:<owner>. ARGV: the report as
-- JSON without its times, life of the keys in seconds, after how many failures a worker is ejected, for how many milliseconds the
-- first time and at most, then the delivery tags that the worker holds.
-- Messages with a future ETA are held too; without renewal they would go to other workers after the visibility time-out.
-- Returns 1 when the worker is marked to drain, and 2 more when it is ejected.
local report = cjson.decode(ARGV[1])
local life, least, first, longest = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)

local before = redis.call('HGET', KEYS[1], report.owner)
-- A Redis that is out of memory refuses a script's first write if it may need some, and none after a write that does not: this report
-- takes the place of the last one.
redis.call('HDEL', KEYS[1], report.owner)
local begins = not before
before = before and cjson.decode(before) or {slots = 0, since = now}
report.since, report.at = before.since, now
local fault = redis.call('HMGET', KEYS[7], 'row', 'beside', 'times', 'till', 'again')
local row, beside, till = tonumber(fault[1]) or 0, tonumber(fault[2]), tonumber(fault[4])
if fault[5] or (not till and beside and row >= least and tonumber(redis.call('HGET', KEYS[6], 'succeeded') or 0) - beside >= least) then
  local times = redis.call('HINCRBY', KEYS[7], 'times', 1)
  till = now + math.min(longest, first * 2 ^ (times - 1))
  redis.call('HSET', KEYS[7], 'till', string.format('%d', till))
  redis.call('HDEL', KEYS[7], 'again')
end
if till and now < till then report.ejected, report.slots = true, 0 end
redis.call('HSET', KEYS[1], report.owner, cjson.encode(report))
redis.call('INCRBY', KEYS[4], (report.scheduled or 0) - (before.scheduled or 0))

for n = 0, report.slots - 1 do redis.call('ZADD', KEYS[2], now, report.owner .. '/' .. n) end
for n = report.slots, before.slots - 1 do redis.call('ZREM', KEYS[2], report.owner .. '/' .. n) end
for i = 6, #ARGV do redis.call('ZADD', KEYS[3], 'XX', clock[1] .. '.' .. string.format('%06d', clock[2]), ARGV[i]) end

-- Without an operator nobody takes over from the lost: a worker that begins forgets those of long ago.
for _, text in ipairs(begins and redis.call('HVALS', KEYS[1]) or {}) do
  local gone = cjson.decode(text)
  if gone.at < now - life * 1000 then
    for n = 0, gone.slots - 1 do redis.call('ZREM', KEYS[2], gone.owner .. '/' .. n) end
    redis.call('DECRBY', KEYS[4], gone.scheduled or 0)
    redis.call('HDEL', KEYS[1], gone.owner)
  end
end
for i = 1, 2 do redis.call('EXPIRE', KEYS[i], life) end
redis.call('EXPIRE', KEYS[4], life)
return redis.call('SISMEMBER', KEYS[5], report.worker) + (report.ejected and 2 or 0)
