-- Move an attempt from one state to another, if it is still the one that the ledger knows.
--
-- KEYS: job, held:<owner>, waiting:<tier>, unacked hash, unacked index, service:<tier>, served:<tier>, attempts:<tier>,
-- checkpoint:<tier>, outlier:<owner>, then every spilled:<tier>.
-- ARGV: task id, attempt, delivery tag and owner ('' before a claim), from, to, life, how it ended, error, retries asked for,
-- delivery tag of a message to acknowledge, whatever the ledger says, the message of that retry ('': it cannot be published again)
-- and its queue, life of the served counts, then the result that counts from this step on: its key, value, life in seconds (0: for
-- ever) and database ('': the ledger's own); or nothing.
-- Returns 1 when it moved, or had moved and only the answer was lost; -1 when the ledger no longer knows the job (Redis came back
-- without it, or it ended long ago): nothing is stored; 0 when another attempt owns the job now.
local id, tag, owner, from, to = ARGV[1], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local function store_result()
  if not ARGV[15] then return end
  if ARGV[18] ~= '' then redis.call('SELECT', ARGV[18]) end
  if ARGV[17] == '0' then
    redis.call('SET', ARGV[15], ARGV[16])
  else
    redis.call('SETEX', ARGV[15], ARGV[17], ARGV[16])
  end
  redis.call('PUBLISH', ARGV[15], ARGV[16])
end
if ARGV[11] ~= '' then
  redis.call('HDEL', KEYS[4], ARGV[11])
  redis.call('ZREM', KEYS[5], ARGV[11])
end
local job = redis.call('HMGET', KEYS[1], 'state', 'attempt', 'tag', 'owner', 'runs', 'claimed_at', 'task', 'suspect', 'suspect_since',
  'suspect_worker')
if not job[1] then
  redis.call('SREM', KEYS[2], id)
  return -1
end
if job[1] == to and job[2] == ARGV[2] and (job[3] or '') == tag and (job[4] or '') == owner then return 1 end
if job[1] ~= from or job[2] ~= ARGV[2] or (job[3] or '') ~= tag or (job[4] or '') ~= owner then return 0 end
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
redis.call('HSET', KEYS[1], 'state', to, to .. '_at', now)
redis.call('EXPIRE', KEYS[1], ARGV[7])
if from == 'claimed' and to ~= 'admitted' and tonumber(job[6]) then
  local seconds = math.max(0, now - job[6]) / 1000
  local jobs, mean = redis.call('HINCRBY', KEYS[7], 'jobs', 1), tonumber(redis.call('HGET', KEYS[7], 'mean') or seconds)
  redis.call('HINCRBYFLOAT', KEYS[7], 'seconds', seconds)
  redis.call('HINCRBYFLOAT', KEYS[7], 'squares', seconds * seconds)
  -- A plain mean at first: a worker's first job takes longer than those that follow, and must not stand for all.
  redis.call('HSET', KEYS[7], 'mean', string.format('%.6f', mean + (seconds - mean) / math.min(jobs, 100)))
  redis.call('EXPIRE', KEYS[7], ARGV[14])
end
if to ~= 'admitted' then
  local good = to == 'done' or (to == 'finishing' and ARGV[8] == 'done')
  if from == 'claimed' and good then
    redis.call('HINCRBY', KEYS[7], 'succeeded', 1)
    redis.call('DEL', KEYS[10])
  end
  local since = redis.call('HGET', KEYS[9], 'since') or '0'
  if from == 'claimed' and good and (tonumber(job[6]) or 0) >= tonumber(since) then
    if redis.call('HGET', KEYS[8], 'since') ~= since then
      redis.call('DEL', KEYS[8])
      redis.call('HSET', KEYS[8], 'since', since)
    end
    redis.call('HINCRBY', KEYS[8], 'succeeded', 1)
    redis.call('EXPIRE', KEYS[8], ARGV[14])
  end
  -- How the job ends here says whether the tier was at fault on which it failed before; one that expires says nothing.
  if job[8] then
    redis.call('HDEL', KEYS[1], 'suspect', 'suspect_since', 'suspect_worker')
    if good and redis.call('EXISTS', job[10]) == 1 then redis.call('HINCRBY', job[10], 'row', 1) end
    if (tonumber(job[9]) or 0) >= (tonumber(redis.call('HGET', job[8], 'since')) or 0) then
      redis.call('HINCRBY', job[8], to == 'expired' and 'failed' or good and 'confirmed' or 'refuted', to == 'expired' and -1 or 1)
      redis.call('EXPIRE', job[8], ARGV[14])
    end
  end
end

local raw = job[5] and redis.call('HGET', KEYS[1], 'run:' .. job[5])
if raw and ARGV[8] ~= '' then
  local run = cjson.decode(raw)
  run.ended, run.how, run.error = now, ARGV[8], ARGV[9] ~= '' and ARGV[9] or nil
  redis.call('HSET', KEYS[1], 'run:' .. job[5], cjson.encode(run))
end
if to == 'finishing' then
  store_result()
  return 1
end

redis.call('SREM', KEYS[2], id)
if to == 'admitted' then
  redis.call('HDEL', KEYS[1], 'tag', 'owner')
  if ARGV[10] ~= '' then
    redis.call('HSET', KEYS[1], 'retries', ARGV[10])
    redis.call('HDEL', KEYS[1], 'left')
  end
  if ARGV[12] ~= '' then
    redis.call('HSET', KEYS[1], 'message', ARGV[12], 'queue', ARGV[13])
    -- The job's life is longer by the time until the retry is due.
    redis.call('ZADD', KEYS[3], now + 1000 * (ARGV[7] - ARGV[14]), id)
  end
  return 1
end
redis.call('ZREM', KEYS[3], id)
redis.call('HDEL', KEYS[1], 'message', 'missing_at')
for i = 11, #KEYS do redis.call('ZREM', KEYS[i], id) end
-- The delivery ends with the job: a worker that lost its connection meanwhile could not acknowledge it any more.
if tag ~= '' then
  redis.call('HDEL', KEYS[4], tag)
  redis.call('ZREM', KEYS[5], tag)
end
if to ~= 'expired' and tag ~= '' and tonumber(job[6]) and job[7] then
  local took, before = (now - job[6]) / 1000, tonumber(redis.call('HGET', KEYS[6], job[7]))
  redis.call('HSET', KEYS[6], job[7], string.format('%.3f', before and 0.8 * before + 0.2 * took or took))
end
store_result()
return 1
