-- The message of a job that waits (for its first run, or for its end to be looked up) is in no list and in no in-flight key: note
-- when that was first seen; the second time, publish it again.
-- The pause between the two is what a worker may take between receiving a message and recording it.
-- One that vanishes each time is not lost: workers without a fence take it, run it and say nothing of it.
--
-- KEYS: job, queue list. ARGV: attempt, the message, milliseconds that it must have been missing, wake channel, pool, tier, how often
-- it is published again before anybody claims it.
-- Returns 1 when it was published, 0 when it was noted, or is claimed or published by now, 2 when it is not published any more.
local job = redis.call('HMGET', KEYS[1], 'state', 'attempt', 'missing_at', 'left', 'republished')
local left = string.find(' ' .. (job[4] or '') .. ' ', ' ' .. ARGV[6] .. ' ', 1, true)
if (job[1] ~= 'admitted' and job[1] ~= 'finishing') or job[2] ~= ARGV[1] or left then return 0 end
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
if not tonumber(job[3]) then
  redis.call('HSET', KEYS[1], 'missing_at', now)
  return 0
end
if now - job[3] < tonumber(ARGV[3]) then return 0 end
if job[1] == 'admitted' and (tonumber(job[5]) or 0) >= tonumber(ARGV[7]) then return 2 end
redis.call('HDEL', KEYS[1], 'missing_at')
redis.call('HINCRBY', KEYS[1], 'republished', 1)
redis.call('RPUSH', KEYS[2], ARGV[2])
redis.call('PUBLISH', ARGV[4], ARGV[5])
return 1
