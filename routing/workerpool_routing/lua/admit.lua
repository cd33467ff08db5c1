-- Decide where a job goes and write it to the ledger, in one step.
--
-- ARGV[1]: JSON, see admission.py: {tiers: [accelerated, plain] or the chosen one, choice?, job?, ...}.
-- Keys travel inside the JSON: Kombu's Redis transport knows no cluster, so no key has to be declared.
-- Returns {tier index from 1, reason, four numbers of the first tier, four of the second}; changes nothing when no job is given.
local request = cjson.decode(ARGV[1])
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)

local function coming(name)
  local raw = redis.call('GET', request.capacity)
  if not raw then return 0 end
  local capacity = cjson.decode(raw)
  local tier = capacity.version == request.version and capacity.tiers[name]
  return tier and tier.starting + tier.startable or 0
end

local function measure(tier)
  local waiting = 0
  for _, list in ipairs(tier.lists) do waiting = waiting + redis.call('LLEN', list) end
  local ready = redis.call('ZCOUNT', tier.slots, '(' .. (now - request.presence_life), '+inf')
  return {waiting = waiting, in_flight = redis.call('HLEN', tier.unacked) - (redis.call('GET', tier.scheduled) or 0), ready = ready, coming = coming(tier.name)}
end

-- The twin of decide.place.
local function place(accelerated, plain)
  if accelerated.ready - accelerated.in_flight - accelerated.waiting > 0 then return 1, 'FreeSlot' end
  if accelerated.coming <= 0 then return 2, 'NoCapacity' end
  if accelerated.waiting > plain.waiting + request.margin then return 2, 'QueueTooLong' end
  return 1, 'SlotStarting'
end

local index, reason, loads = 1, request.choice, {}
if not reason then
  local accelerated, plain = measure(request.tiers[1]), measure(request.tiers[2])
  index, reason = place(accelerated, plain)
  for _, load in ipairs({accelerated, plain}) do
    for _, what in ipairs({'waiting', 'in_flight', 'ready', 'coming'}) do loads[#loads + 1] = load[what] end
  end
end

local tier, wanted, job = request.tiers[index], request.wanted, request.job
if job then
  redis.call('HSET', job.key, 'version', request.version, 'state', 'admitted', 'attempt', 1, 'task', job.task,
    'tier', tier.name, 'wanted', wanted.name, 'required', job.required, 'reason', reason, 'admitted_at', now)
  redis.call('EXPIRE', job.key, request.job_life)
  redis.call('ZADD', tier.waiting, now, job.id)
  redis.call('ZREMRANGEBYSCORE', tier.waiting, '-inf', now - request.job_life * 1000)
  if tier.name ~= wanted.name then
    redis.call('ZADD', wanted.spilled, now, job.id)
    redis.call('ZREMRANGEBYSCORE', wanted.spilled, '-inf', now - request.job_life * 1000)
  end
  redis.call('HINCRBY', request.routes, tier.name .. ':' .. reason, 1)
  redis.call('PUBLISH', request.wake, request.pool)
end
return {index, reason, unpack(loads)}
