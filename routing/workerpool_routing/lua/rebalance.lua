-- Move the message of a job that no worker has started to the queue of another tier, behind what has waited longer there, and
-- behind what has been started before and was put at the head to run again. A message that a worker has taken is in no list, so
-- that it cannot be moved; of several callers one wins.
--
-- message, renewed: as it stands in its list, and as it goes into the other one. limit: the longest message that the ledger
-- keeps. far: with how many messages, from the head of the other list on, its age is compared to find its place; look: and with
-- about how many bytes of them.
-- Returns 1 when it moved, 0 when the job, or its message, is no longer where the caller saw it.
local job, list, other_list, waiting, other_waiting, spilled, routes = unpack(KEYS)
local id, attempt, tier, message, renewed, other_tier, other_queue, reason, life, limit, far, look = unpack(ARGV)
local state, latest, place, runs, wanted, admitted_at, left_before =
  unpack(redis.call('HMGET', job, 'state', 'attempt', 'tier', 'runs', 'wanted', 'admitted_at', 'left'))
if state ~= 'admitted' or latest ~= attempt or place ~= tier or runs then return 0 end
if redis.call('LREM', list, -1, message) == 0 then return 0 end
local since = tonumber(redis.call('ZSCORE', waiting, id) or admitted_at)

local jobs = string.sub(job, 1, -#id - 1)
local function queued_at(text)
  local known, score = pcall(function()
    local other = cjson.decode(text).headers.id
    return redis.call('HEXISTS', jobs .. other, 'runs') == 0 and redis.call('ZSCORE', other_waiting, other)
  end)
  return known and tonumber(score or nil) or -math.huge
end
-- The head of a list is its right end. What is ahead of the job comes off and goes back on: to insert in the middle, Redis would
-- walk the whole list from its other end.
-- Long messages are looked at in smaller number: meanwhile Redis serves nobody.
local head = redis.call('LRANGE', other_list, -math.min(far, math.ceil(look / #message)), -1)
local behind = #head
while behind > 0 and queued_at(head[behind]) <= since do behind = behind - 1 end
if behind < #head then redis.call('RPOP', other_list, #head - behind) end
redis.call('RPUSH', other_list, renewed, unpack(head, behind + 1))

-- A copy that comes up where it has left counts no more: "left", a word for each such tier, tells a claim, a requeue and a sweep.
local left = {tier}
for earlier in string.gmatch(left_before or '', '%S+') do
  if earlier ~= tier and earlier ~= other_tier then left[#left + 1] = earlier end
end
redis.call('HSET', job, 'tier', other_tier, 'queue', other_queue, 'reason', reason, 'left', table.concat(left, ' '))
redis.call('HDEL', job, 'missing_at', 'message')
if #renewed <= tonumber(limit) then redis.call('HSET', job, 'message', renewed) end
if redis.call('TTL', job) < tonumber(life) then redis.call('EXPIRE', job, life) end -- it is longer for one with an ETA
redis.call('ZREM', waiting, id)
redis.call('ZADD', other_waiting, since, id)
if wanted == other_tier then redis.call('ZREM', spilled, id) else redis.call('ZADD', spilled, since, id) end
redis.call('EXPIRE', spilled, life)
redis.call('HINCRBY', routes, other_tier .. ':' .. reason, 1)
return 1
