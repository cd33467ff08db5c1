-- One delivery asks to run its job.
--
-- KEYS: job, held:<owner>. ARGV: task id, attempt, delivery tag, owner, tier, retries, losses allowed, job life,
-- 1 when a loss moves the job on to another tier, 1 when a finishing attempt is known to have no result, a name for this request.
-- Returns: run | unknown | ended | stale | lost | finishing | poison.
local id, attempt, tag, owner, tier = ARGV[1], tonumber(ARGV[2]), ARGV[3], ARGV[4], ARGV[5]
local retries, losses_allowed, life = tonumber(ARGV[6]), tonumber(ARGV[7]), ARGV[8]
local moves_on, no_result = ARGV[9] == '1', ARGV[10] == '1'
local job = redis.call('HMGET', KEYS[1], 'state', 'attempt', 'retries', 'losses', 'required', 'claim')
local state = job[1]

if not state then return 'unknown' end
if state == 'done' or state == 'failed' or state == 'expired' then return 'ended' end
if tonumber(job[2]) ~= attempt then return 'stale' end

-- The answer was lost on its way, and the client asks again.
if state == 'claimed' and job[6] == ARGV[11] then return 'run' end

-- A retry that the task's author asked for overtakes the attempt that asked: it is a new delivery, but nothing was lost.
local retried = retries > tonumber(job[3] or 0)
if state == 'finishing' and not retried and not no_result then return 'finishing' end

local losses = tonumber(job[4] or 0)
if state ~= 'admitted' and not retried then
  if moves_on and job[5] ~= '1' then return 'lost' end
  losses = redis.call('HINCRBY', KEYS[1], 'losses', 1)
end

local clock = redis.call('TIME')
redis.call('HSET', KEYS[1], 'state', 'claimed', 'tag', tag, 'owner', owner, 'tier', tier, 'retries', retries, 'claim', ARGV[11],
  'claimed_at', clock[1] * 1000 + math.floor(clock[2] / 1000))
redis.call('EXPIRE', KEYS[1], life)
redis.call('SADD', KEYS[2], id)
redis.call('EXPIRE', KEYS[2], life)
if losses > losses_allowed then return 'poison' end
redis.call('HINCRBY', KEYS[1], 'starts:' .. tier, 1)
return 'run'
