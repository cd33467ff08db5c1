-- One delivery asks to run its job.
--
-- KEYS: job, held:<owner>, waiting:<tier>, unacked hash, waits:<tier>. ARGV: task id, attempt, delivery tag, owner, tier, retries,
-- losses allowed, job life, 1 when a loss moves the job on to another tier, 1 when a finishing attempt is known to have no result,
-- a name for this request, 1 when its caller asked for a time, the delivery tag of the attempt that asked for this retry ('': none
-- did, or none that says so), the seconds and the part of a wait within which it is as expected.
-- Returns: run | unknown | ended | stale | lost | finishing | poison | corrupt.
local id, attempt, tag, owner, tier = ARGV[1], tonumber(ARGV[2]), ARGV[3], ARGV[4], ARGV[5]
local retries, losses_allowed, life = tonumber(ARGV[6]), tonumber(ARGV[7]), ARGV[8]
local moves_on, no_result = ARGV[9] == '1', ARGV[10] == '1'
local kind = redis.call('TYPE', KEYS[1]).ok
if kind == 'none' then return 'unknown' end
if kind ~= 'hash' then return 'corrupt' end
local job = redis.call('HMGET', KEYS[1], 'state', 'attempt', 'retries', 'losses', 'required', 'tag', 'runs', 'claim', 'left', 'wait',
  'admitted_at')
local state = job[1]

if state == 'done' or state == 'failed' or state == 'expired' then return 'ended' end
local known = state == 'admitted' or state == 'claimed' or state == 'finishing'
local numbers = tonumber(job[2]) and tonumber(job[3] or 0) and tonumber(job[4] or 0) and tonumber(job[7] or 0)
if not known or not numbers then return 'corrupt' end
if tonumber(job[2]) ~= attempt then return 'stale' end

-- The answer was lost on its way, and the client asks again.
if state == 'claimed' and job[8] == ARGV[11] then return 'run' end
-- A worker that was silent for too long still has the message, and another delivery of it is on its way.
if redis.call('HEXISTS', KEYS[4], tag) == 0 then return 'stale' end

-- A retry that the task's author asked for overtakes the attempt that asked: it is a new delivery, but nothing was lost.
-- One that a zombie asked for does not overtake the attempt that counts.
local asked = tonumber(job[3] or 0)
if retries < asked then return 'stale' end
local retried = retries > asked
if retried and state ~= 'admitted' and ARGV[13] ~= '' and ARGV[13] ~= job[6] then return 'stale' end
-- A copy that comes up where the job has left, before or after its first start elsewhere.
if not retried and string.find(' ' .. (job[9] or '') .. ' ', ' ' .. tier .. ' ', 1, true) then return 'stale' end
-- Another delivery of the same attempt, while the one that claimed is still in flight, is a copy and no loss.
if state ~= 'admitted' and not retried and job[6] ~= tag and redis.call('HEXISTS', KEYS[4], job[6]) == 1 then return 'stale' end
if state == 'finishing' and not retried and not no_result then return 'finishing' end

local losses = tonumber(job[4] or 0)
if state ~= 'admitted' and not retried then
  if moves_on and job[5] ~= '1' then return 'lost' end
  losses = redis.call('HINCRBY', KEYS[1], 'losses', 1)
end

local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
redis.call('HSET', KEYS[1], 'state', 'claimed', 'tag', tag, 'owner', owner, 'tier', tier, 'retries', retries,
  'stays', moves_on and '0' or '1', 'claim', ARGV[11],
  'claimed_at', now)
redis.call('HDEL', KEYS[1], 'message', 'missing_at', 'republished')
redis.call('EXPIRE', KEYS[1], life)
redis.call('SADD', KEYS[2], id)
redis.call('EXPIRE', KEYS[2], life)
redis.call('ZREM', KEYS[3], id)
if losses > losses_allowed then
  redis.call('HSET', KEYS[1], 'state', 'finishing')
  return 'poison'
end
redis.call('HINCRBY', KEYS[1], 'starts:' .. tier, 1)
local run = redis.call('HINCRBY', KEYS[1], 'runs', 1)
redis.call('HSET', KEYS[1], 'run:' .. run, cjson.encode({attempt = attempt, tier = tier, owner = owner, began = now}))
redis.call('HDEL', KEYS[1], 'run:' .. (run - 16))
local expected = tonumber(job[10] or nil)
if run == 1 and expected and expected < math.huge and ARGV[12] ~= '1' then
  local real = math.max(0, now - job[11]) / 1000
  redis.call('HINCRBY', KEYS[5], 'jobs', 1)
  redis.call('HINCRBYFLOAT', KEYS[5], 'seconds', real)
  redis.call('HINCRBYFLOAT', KEYS[5], 'expected', expected)
  redis.call('HINCRBY', KEYS[5], 'right', math.abs(expected - real) <= math.max(tonumber(ARGV[14]), tonumber(ARGV[15]) * real) and 1 or 0)
  redis.call('EXPIRE', KEYS[5], life)
end
return 'run'
