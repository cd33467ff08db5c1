-- Move the message of a job that no worker has started to the queue of another tier, behind what has waited longer there, and behind
-- what has been started before and was put at the head to run again.
-- A message that a worker has taken is in no list, so that it cannot be moved; of several callers one wins.
--
-- KEYS: job, queue list, new queue list, waiting:<tier>, waiting:<new tier>, spilled:<wanted tier>, routes.
-- ARGV: task id, attempt, tier, the message as it stands in its list, the message for the new list, new tier, new queue, reason, life,
-- the longest message that the ledger keeps, how far from the head of the new list its place is looked for.
-- Returns 1 when it moved, 0 when the job, or its message, is no longer where the caller saw it.
local id, tier, message, to, far = ARGV[1], ARGV[3], ARGV[5], ARGV[6], tonumber(ARGV[11])
local job = redis.call('HMGET', KEYS[1], 'state', 'attempt', 'tier', 'required', 'runs', 'wanted', 'admitted_at', 'left')
if job[1] ~= 'admitted' or job[2] ~= ARGV[2] or job[3] ~= tier or job[4] == '1' or job[5] then return 0 end
if redis.call('LREM', KEYS[2], -1, ARGV[4]) == 0 then return 0 end
local since = tonumber(redis.call('ZSCORE', KEYS[4], id) or job[7])

local jobs = string.sub(KEYS[1], 1, -#id - 1)
local function queued_at(text)
  local known, score = pcall(function()
    local other = cjson.decode(text).headers.id
    return redis.call('HEXISTS', jobs .. other, 'runs') == 0 and redis.call('ZSCORE', KEYS[5], other)
  end)
  return known and tonumber(score or nil) or -math.huge
end
local line = redis.call('LRANGE', KEYS[3], -far, -1)
local place = #line
while place > 0 and queued_at(line[place]) <= since do place = place - 1 end
if place > 0 then
  redis.call('LINSERT', KEYS[3], 'AFTER', line[place], message)
elseif #line == far then
  redis.call('LINSERT', KEYS[3], 'BEFORE', line[1], message)
else
  redis.call('LPUSH', KEYS[3], message)
end

-- A copy that comes up where it has left counts no more: "left", a word for each such tier, says so to a claim, a requeue and a sweep.
local left = {tier}
for other in string.gmatch(job[8] or '', '%S+') do
  if other ~= tier and other ~= to then left[#left + 1] = other end
end
redis.call('HSET', KEYS[1], 'tier', to, 'queue', ARGV[7], 'reason', ARGV[8], 'left', table.concat(left, ' '))
redis.call('HDEL', KEYS[1], 'missing_at', 'message')
if #message <= tonumber(ARGV[10]) then redis.call('HSET', KEYS[1], 'message', message) end
-- The life of a job with an ETA may be longer.
if redis.call('TTL', KEYS[1]) < tonumber(ARGV[9]) then redis.call('EXPIRE', KEYS[1], ARGV[9]) end
redis.call('ZREM', KEYS[4], id)
redis.call('ZADD', KEYS[5], since, id)
if job[6] == to then redis.call('ZREM', KEYS[6], id) else redis.call('ZADD', KEYS[6], since, id) end
redis.call('EXPIRE', KEYS[6], ARGV[9])
redis.call('HINCRBY', KEYS[7], to .. ':' .. ARGV[8], 1)
return 1
