-- Forget a worker that has left, or whose jobs have been taken over.
local presence, slots, held, scheduled, outlier = unpack(KEYS)
local owner = unpack(ARGV)
local report = redis.call('HGET', presence, owner)
if report then
  report = cjson.decode(report)
  redis.call('DECRBY', scheduled, report.scheduled or 0)
  for n = 0, report.slots - 1 do redis.call('ZREM', slots, owner .. '/' .. n) end
  redis.call('HDEL', presence, owner)
end
redis.call('DEL', held, outlier)
return 1
