-- Give a claimed job another run: take its message out of the in-flight keys and put the rewritten one at the head of a queue.
-- Whoever sees the failure or the loss calls this; one caller wins, the others change nothing.
--
-- KEYS: job, held:<owner>, unacked hash, unacked index, queue list, routes, waiting:<new tier>, attempts:<old tier>,
-- checkpoint:<old tier>, served:<old tier>, outlier:<owner>.
-- ARGV: task id, attempt, delivery tag on the ledger, delivery tag in the in-flight keys, new attempt, new tier, reason,
-- 1 when it counts as a loss on a tier that it cannot leave (which is allowed once), the message, wake channel, pool, life, queue,
-- how the run ended, error.
-- Returns 1 when it moved, 0 when another caller, or the attempt itself, was first.
local job = redis.call('HMGET', KEYS[1], 'state', 'attempt', 'tag', 'runs', 'claimed_at')
if job[1] ~= 'claimed' and job[1] ~= 'finishing' then return 0 end
if job[2] ~= ARGV[2] or job[3] ~= ARGV[3] then return 0 end
if redis.call('HDEL', KEYS[3], ARGV[4]) == 0 then return 0 end
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
redis.call('ZREM', KEYS[4], ARGV[4])
redis.call('HDEL', KEYS[1], 'tag', 'owner')
if ARGV[5] ~= ARGV[2] then
  redis.call('HDEL', KEYS[1], 'left')
  -- The tier is suspected until it is known how the job ends elsewhere. What was finishing has been counted: it ended well here.
  local began, since = tonumber(job[5]) or 0, redis.call('HGET', KEYS[9], 'since') or '0'
  if job[1] == 'claimed' and began >= tonumber(since) then
    if redis.call('HGET', KEYS[8], 'since') ~= since then
      redis.call('DEL', KEYS[8])
      redis.call('HSET', KEYS[8], 'since', since)
    end
    redis.call('HINCRBY', KEYS[8], 'failed', 1)
    redis.call('EXPIRE', KEYS[8], ARGV[12])
    redis.call('HSET', KEYS[1], 'suspect', KEYS[8], 'suspect_since', began, 'suspect_worker', KEYS[11])
    redis.call('HSETNX', KEYS[11], 'beside', redis.call('HGET', KEYS[10], 'succeeded') or 0)
    -- A worker that was ejected and is tried again has failed again.
    if now >= (tonumber(redis.call('HGET', KEYS[11], 'till')) or math.huge) then redis.call('HSET', KEYS[11], 'again', 1) end
    redis.call('EXPIRE', KEYS[11], ARGV[12])
  end
end
redis.call('HSET', KEYS[1], 'state', 'admitted', 'attempt', ARGV[5], 'tier', ARGV[6], 'reason', ARGV[7], 'message', ARGV[9],
  'queue', ARGV[13])
if ARGV[8] == '1' then redis.call('HINCRBY', KEYS[1], 'losses', 1) end
redis.call('EXPIRE', KEYS[1], ARGV[12])
local raw = job[4] and redis.call('HGET', KEYS[1], 'run:' .. job[4])
if raw then
  local run = cjson.decode(raw)
  run.ended, run.how, run.error = now, ARGV[14], ARGV[15] ~= '' and ARGV[15] or nil
  redis.call('HSET', KEYS[1], 'run:' .. job[4], cjson.encode(run))
end
redis.call('SREM', KEYS[2], ARGV[1])
redis.call('RPUSH', KEYS[5], ARGV[9])
redis.call('ZADD', KEYS[7], now, ARGV[1])
redis.call('HINCRBY', KEYS[6], ARGV[6] .. ':' .. ARGV[7], 1)
redis.call('PUBLISH', ARGV[10], ARGV[11])
return 1
