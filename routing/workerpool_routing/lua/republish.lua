-- The message of a job that waits (for its first run, or for its end to be looked up) is in no list and in no in-flight key: note
-- when that was first seen; the second time, publish it again.
-- The pause between the two is what a worker may take between receiving a message and recording it.
-- One that vanishes each time is not lost: workers without a fence take it, run it and say nothing of it.
--
-- pause: milliseconds that it must have been missing. most: how often it is published again before anybody claims it.
-- Returns 1 when it was published, 0 when it was noted, or is claimed or published by now, 2 when it is not published any more.
local job, list = unpack(KEYS)
local attempt, message, pause, wake, pool, tier, most = unpack(ARGV)
local state, latest, missing_at, left, republished =
  unpack(redis.call('HMGET', job, 'state', 'attempt', 'missing_at', 'left', 'republished'))
local has_left = string.find(' ' .. (left or '') .. ' ', ' ' .. tier .. ' ', 1, true)
if (state ~= 'admitted' and state ~= 'finishing') or latest ~= attempt or has_left then return 0 end
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
if not tonumber(missing_at) then
  redis.call('HSET', job, 'missing_at', now)
  return 0
end
if now - missing_at < tonumber(pause) then return 0 end
if state == 'admitted' and (tonumber(republished) or 0) >= tonumber(most) then return 2 end
redis.call('HDEL', job, 'missing_at')
redis.call('HINCRBY', job, 'republished', 1)
redis.call('RPUSH', list, message)
redis.call('PUBLISH', wake, pool)
return 1
