-- A worker says that it is there, and renews every message that it holds.
--
-- text: the report as JSON, without its times. life: of the keys, in seconds. least, first, longest: after how many failures a
-- worker is ejected, and for how many milliseconds the first time and at most. ARGV end with the delivery tags that it holds,
-- messages with a future ETA among them: without renewal these would go to other workers after the visibility time-out.
-- Returns 1 when the worker is marked to drain, and 2 more when it is ejected.
local presence, slots, index, scheduled, drain, served, outlier = unpack(KEYS)
local text, life, least, first, longest = unpack(ARGV)
local report = cjson.decode(text)
least, longest = tonumber(least), tonumber(longest)
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)

local before = redis.call('HGET', presence, report.owner)
-- Out of memory, Redis refuses a script's first write if it may need some, and no later one: this report takes the last one's place.
redis.call('HDEL', presence, report.owner)
local begins = not before
before = before and cjson.decode(before) or {slots = 0, since = now}
report.since, report.at = before.since, now
local row, beside, till, again = unpack(redis.call('HMGET', outlier, 'row', 'beside', 'till', 'again'))
row, beside, till = tonumber(row) or 0, tonumber(beside), tonumber(till)
local succeeded = tonumber(redis.call('HGET', served, 'succeeded')) or 0
if again or (not till and beside and row >= least and succeeded - beside >= least) then
  local times = redis.call('HINCRBY', outlier, 'times', 1)
  till = now + math.min(longest, first * 2 ^ (times - 1))
  redis.call('HSET', outlier, 'till', string.format('%d', till))
  redis.call('HDEL', outlier, 'again')
end
if till and now < till then report.ejected, report.slots = true, 0 end
redis.call('HSET', presence, report.owner, cjson.encode(report))
redis.call('INCRBY', scheduled, (report.scheduled or 0) - (before.scheduled or 0))

for n = 0, report.slots - 1 do redis.call('ZADD', slots, now, report.owner .. '/' .. n) end
for n = report.slots, before.slots - 1 do redis.call('ZREM', slots, report.owner .. '/' .. n) end
for i = 6, #ARGV do redis.call('ZADD', index, 'XX', clock[1] .. '.' .. string.format('%06d', clock[2]), ARGV[i]) end

-- Without an operator nobody takes over from the lost: a worker that begins forgets those of long ago.
for _, other in ipairs(begins and redis.call('HVALS', presence) or {}) do
  local gone = cjson.decode(other)
  if gone.at < now - life * 1000 then
    for n = 0, gone.slots - 1 do redis.call('ZREM', slots, gone.owner .. '/' .. n) end
    redis.call('DECRBY', scheduled, gone.scheduled or 0)
    redis.call('HDEL', presence, gone.owner)
  end
end
for _, key in ipairs({presence, slots, scheduled}) do redis.call('EXPIRE', key, life) end
return redis.call('SISMEMBER', drain, report.worker) + (report.ejected and 2 or 0)
