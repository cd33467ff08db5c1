-- Forget a worker that has left, or whose jobs have been taken over.
--
-- KEYS: presence:<tier>, slots:<tier>, held:<owner>, scheduled:<tier>, outlier:<owner>. ARGV: owner.
local report = redis.call('HGET', KEYS[1], ARGV[1])
if report then redis.call('DECRBY', KEYS[4], cjson.decode(report).scheduled or 0) end
redis.call('HDEL', KEYS[1], ARGV[1])
for _, slot in ipairs(redis.call('ZRANGE', KEYS[2], 0, -1)) do
  if string.match(slot, '^(.*)/%d+$') == ARGV[1] then redis.call('ZREM', KEYS[2], slot) end
end
redis.call('DEL', KEYS[3], KEYS[5])
return 1
