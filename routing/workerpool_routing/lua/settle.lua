-- Move an attempt from one state to another, if it is still the one that the ledger knows.
--
-- KEYS: job, held:<owner>, then every spilled:<tier>. ARGV: task id, attempt, delivery tag ('' before a claim), from, to, life,
-- the key served:<tier> without the tier.
-- Returns 1 when it moved, or had moved and only the answer was lost; -1 when the ledger no longer knows the job (Redis came back
-- without it): nobody else can have it; 0 when another attempt owns the job now.
local job = redis.call('HMGET', KEYS[1], 'state', 'attempt', 'tag', 'tier', 'claimed_at')
if not job[1] then
  redis.call('SREM', KEYS[2], ARGV[1])
  return -1
end
if job[1] == ARGV[5] and job[2] == ARGV[2] and job[3] == ARGV[3] then return 1 end
if job[1] ~= ARGV[4] or job[2] ~= ARGV[2] or (job[3] or '') ~= ARGV[3] then return 0 end
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
redis.call('HSET', KEYS[1], 'state', ARGV[5], ARGV[5] .. '_at', now)
if ARGV[4] == 'claimed' and ARGV[5] ~= 'admitted' then
  local served, seconds = ARGV[7] .. job[4], math.max(0, now - tonumber(job[5])) / 1000
  redis.call('HINCRBY', served, 'jobs', 1)
  redis.call('HINCRBYFLOAT', served, 'seconds', seconds)
  redis.call('HINCRBYFLOAT', served, 'squares', seconds * seconds)
  redis.call('EXPIRE', served, ARGV[6])
end
redis.call('EXPIRE', KEYS[1], ARGV[6])
if ARGV[5] == 'finishing' then return 1 end
redis.call('SREM', KEYS[2], ARGV[1])
if ARGV[5] == 'admitted' then
  redis.call('HDEL', KEYS[1], 'tag', 'owner')
else
  for i = 3, #KEYS do redis.call('ZREM', KEYS[i], ARGV[1]) end
end
return 1
