-- One delivery asks to run its job.
--
-- retries: of the delivery. losses_allowed: on a tier that the job cannot leave. moves_on: 1 when a loss moves the job to another
-- tier. no_result: 1 when a finishing attempt is known to have no result. request: a name for this call. scheduled: 1 when the
-- caller of the job asked for a time. asked_by: the delivery tag of the attempt that asked for this retry ('': none did, or none
-- that says so). as_expected_seconds, as_expected_part: a wait was as expected if it is off by no more than so long, or by such a
-- part of itself.
-- Returns: run | unknown | ended | stale | lost | finishing | poison | corrupt.
local job, held, waiting, unacked, waits = unpack(KEYS)
local id, attempt, tag, owner, tier, retries, losses_allowed, life, moves_on, no_result, request, scheduled, asked_by,
  as_expected_seconds, as_expected_part = unpack(ARGV)
attempt, retries = tonumber(attempt), tonumber(retries)
local kind = redis.call('TYPE', job).ok
if kind == 'none' then return 'unknown' end
if kind ~= 'hash' then return 'corrupt' end
local state, latest, asked, losses, required, claimed_as, runs, answered, left, expected, admitted_at = unpack(redis.call(
  'HMGET', job, 'state', 'attempt', 'retries', 'losses', 'required', 'tag', 'runs', 'claim', 'left', 'wait', 'admitted_at'))

if state == 'done' or state == 'failed' or state == 'expired' then return 'ended' end
if state ~= 'admitted' and state ~= 'claimed' and state ~= 'finishing' then return 'corrupt' end
latest, asked, losses = tonumber(latest), tonumber(asked or 0), tonumber(losses or 0)
if not latest or not asked or not losses or not tonumber(runs or 0) then return 'corrupt' end
if latest ~= attempt then return 'stale' end

-- The answer was lost on its way, and the client asks again.
if state == 'claimed' and answered == request then return 'run' end
-- A worker that was silent for too long still has the message, and another delivery of it is on its way.
if redis.call('HEXISTS', unacked, tag) == 0 then return 'stale' end

-- A retry that the task's author asked for overtakes the attempt that asked: it is a new delivery, but nothing was lost.
-- One that a zombie asked for does not overtake the attempt that counts.
if retries < asked then return 'stale' end
local retried = retries > asked
if retried and state ~= 'admitted' and asked_by ~= '' and asked_by ~= claimed_as then return 'stale' end
-- A copy that comes up where the job has left, before or after its first start elsewhere.
if not retried and string.find(' ' .. (left or '') .. ' ', ' ' .. tier .. ' ', 1, true) then return 'stale' end
-- Another delivery of the same attempt, while the one that claimed is still in flight, is a copy and no loss.
local again = state ~= 'admitted' and not retried
if again and claimed_as ~= tag and redis.call('HEXISTS', unacked, claimed_as) == 1 then return 'stale' end
if again and state == 'finishing' and no_result ~= '1' then return 'finishing' end
if again then
  if moves_on == '1' and required ~= '1' then return 'lost' end
  losses = redis.call('HINCRBY', job, 'losses', 1)
end

local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
redis.call('HSET', job, 'state', 'claimed', 'tag', tag, 'owner', owner, 'tier', tier, 'retries', retries,
  'stays', moves_on == '1' and 0 or 1, 'claim', request, 'claimed_at', now)
redis.call('HDEL', job, 'message', 'missing_at', 'republished')
redis.call('EXPIRE', job, life)
redis.call('SADD', held, id)
redis.call('EXPIRE', held, life)
redis.call('ZREM', waiting, id)
if losses > tonumber(losses_allowed) then
  redis.call('HSET', job, 'state', 'finishing')
  return 'poison'
end
redis.call('HINCRBY', job, 'starts:' .. tier, 1)
local run = redis.call('HINCRBY', job, 'runs', 1)
redis.call('HSET', job, 'run:' .. run, cjson.encode({attempt = attempt, tier = tier, owner = owner, began = now}))
redis.call('HDEL', job, 'run:' .. (run - 16))
expected = tonumber(expected)
if run == 1 and expected and expected < math.huge and scheduled ~= '1' then
  local real = math.max(0, now - admitted_at) / 1000
  local as_expected = math.abs(expected - real) <= math.max(tonumber(as_expected_seconds), as_expected_part * real)
  redis.call('HINCRBY', waits, 'jobs', 1)
  redis.call('HINCRBYFLOAT', waits, 'seconds', real)
  redis.call('HINCRBYFLOAT', waits, 'expected', expected)
  redis.call('HINCRBY', waits, 'right', as_expected and 1 or 0)
  redis.call('EXPIRE', waits, life)
end
return 'run'
