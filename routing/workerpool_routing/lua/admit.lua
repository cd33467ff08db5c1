-- Decide where a job goes, write it to the ledger and publish it, in one step.
--
-- ARGV[1]: JSON that depends on the candidates alone; ARGV[2]: JSON that depends on the job; see admission.py for both.
-- ARGV[3], ARGV[4]: the job's message before and after the name of its queue.
-- Keys travel inside the JSON: Kombu's Redis transport knows no cluster, so no key has to be declared.
-- Returns {Redis's time, task id, tier, queue, reason, wait, waiting, in flight, ready, leased, slots that come or may,
-- milliseconds until the next of them}, the loads being those of the first candidate; {time} when the caller has given up by now.
local pool, ask = cjson.decode(ARGV[1]), cjson.decode(ARGV[2])
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
if ask.until_ms and now > ask.until_ms then return {now} end

-- Whoever asks for a publish again, with the same key or because the connection broke, gets what the first call got.
if ask.step then
  for _, key in ipairs({ask.job or ask.idempotent, ask.idempotent}) do
    local first = redis.call('HMGET', key, 'id', 'tier', 'queue', 'reason', 'wait')
    if first[1] then return {now, unpack(first)} end
  end
end

local coming = {}
local raw = redis.call('GET', pool.capacity)
if raw then
  local capacity = cjson.decode(raw)
  if capacity.version == pool.version then coming = capacity.tiers end
end

local function measure(tier)
  local load = {waiting = 0}
  for _, list in ipairs(tier.lists) do load.waiting = load.waiting + redis.call('LLEN', list) end
  -- Workers tell of what is scheduled once a second: what they have run or given back since is still counted there.
  load.in_flight = math.max(0, redis.call('HLEN', tier.unacked) - (redis.call('GET', tier.scheduled) or 0))
  load.ready = redis.call('ZCOUNT', tier.slots, '(' .. (now - pool.presence_life), '+inf')
  load.leased = redis.call('ZCOUNT', tier.leases, '(' .. now, '+inf')
  local capacity = coming[tier.name] or {starting = {}, startable = 0}
  load.startable, load.start, load.target = capacity.startable, capacity.start_seconds, capacity.target_seconds
  load.full = tonumber(capacity.limit) and load.waiting + load.in_flight + load.leased >= capacity.limit
  load.coming, load.expected, load.next_slot = {}, load.startable, load.startable > 0 and load.start or math.huge
  for i, group in ipairs(capacity.starting) do
    load.coming[i] = {group.slots, math.max(0, group.ready_at - now) / 1000}
    load.expected = load.expected + group.slots
  end
  if load.coming[1] then load.next_slot = load.coming[1][2] end
  load.service = tonumber(redis.call('HGET', tier.service, ask.task) or nil)
  load.mean = tonumber(redis.call('HGET', tier.served, 'mean') or nil)
  load.assumed = tier.assumed
  return load
end

-- From here to the blank line before "act": the twin of decide.place.
local function wait(load)
  if load.full then return math.huge end
  local free = load.ready - load.in_flight - load.waiting - load.leased
  if free > 0 then return 0 end
  local service = math.max(load.mean or load.service or load.assumed, pool.shortest_seconds)
  local place, slots, offset = load.in_flight + load.waiting + load.leased + 1, load.ready, 0
  local soonest = slots > 0 and (place - slots) * service / slots or math.huge
  for _, group in ipairs(load.coming) do
    slots, offset = slots + group[1], offset + group[1] * group[2]
    soonest = math.min(soonest, math.max(group[2], ((place - slots) * service + offset) / slots))
  end
  if load.startable <= 0 then return soonest end
  local start, within = load.start, math.max(load.start, load.target)
  if soonest <= within then return soonest end
  local lacking = (place - slots) * service - slots * within + offset
  local more = math.min(load.startable, math.max(1, math.ceil(lacking / (service + within - start))))
  slots, offset = slots + more, offset + more * start
  return math.min(soonest, math.max(start, ((place - slots) * service + offset) / slots))
end

local function weigh(fast, slow, spilling)
  if fast.full then return 'TierBroken', true end
  if fast.service and slow.service then
    if fast.ready + fast.expected <= 0 then return 'NoCapacity', true end
    local threshold = math.max(0, math.sqrt(fast.service * slow.service) - fast.service) * (spilling and pool.back or 1)
    if fast.wait - slow.wait <= threshold then return 'WorthTheWait' end
    return 'WaitTooLong', true
  end
  if fast.next_slot == math.huge then return 'NoCapacity', true end
  if fast.next_slot - slow.wait > pool.patience then return 'SlotTooFar', true end
  if fast.waiting + fast.leased > slow.waiting + slow.leased + pool.margin then return 'QueueTooLong', true end
  return 'SlotStarting'
end

local loads = {}
local function soonest(first)
  local best = first
  for index = first + 1, #loads do
    if loads[index].wait < loads[best].wait or loads[best].full and not loads[index].full then best = index end
  end
  return best
end

local function prefer(spilling)
  for index = 1, pool.accelerated do
    local load = loads[index]
    if not load.full and load.ready - load.in_flight - load.waiting - load.leased > 0 then return index, 'FreeSlot' end
  end
  local plain, first = soonest(pool.accelerated + 1), nil
  for index = 1, pool.accelerated do
    local reason, spills = weigh(loads[index], loads[plain], spilling)
    if not spills then return index, reason end
    first = first or reason
  end
  return plain, first
end

for index, tier in ipairs(pool.tiers) do
  loads[index] = measure(tier)
  loads[index].wait = wait(loads[index])
end
local index, reason, was_spilling = soonest(1), pool.reason, false
if not reason then
  was_spilling = redis.call('HEXISTS', pool.sides, ask.task) == 1
  index, reason = prefer(was_spilling)
end
local side = reason
local longest = ask.limit or math.huge
if loads[index].full or loads[index].wait > longest then
  local best = soonest(1)
  if ask.refuses and (loads[best].full or loads[best].wait > longest) then
    index, reason = best, 'Overloaded'
  elseif best ~= index then
    index, reason = best, 'StartsSooner'
  end
end

-- act
local tier, first = pool.tiers[index], loads[1]
local wanted = pool.wanted or tier
local seconds = ask.wait or string.format('%.17g', loads[index].wait)
local next_ms = first.expected > 0 and math.floor(1000 * first.next_slot + 0.5) or 0
local answer = {now, ask.id or '', tier.name, tier.queue, reason, seconds,
  first.waiting, first.in_flight, first.ready, first.leased, first.expected, next_ms}
if not (ask.id or ask.lease) then return answer end

if not pool.reason then
  if side == 'WaitTooLong' and not was_spilling then redis.call('HSET', pool.sides, ask.task, 1) end
  if was_spilling and (side == 'WorthTheWait' or side == 'FreeSlot') then redis.call('HDEL', pool.sides, ask.task) end
end
if ask.lease then
  redis.call('ZREMRANGEBYSCORE', tier.leases, '-inf', now)
  redis.call('ZADD', tier.leases, now + pool.lease_life, ask.lease)
  redis.call('PEXPIRE', tier.leases, pool.lease_life)
  return answer
end
redis.call('HINCRBY', pool.routes, tier.name .. ':' .. reason, 1)
redis.call('PUBLISH', pool.wake, pool.name)
if reason == 'Overloaded' then return answer end

local message = ARGV[3] .. cjson.encode(tier.queue) .. ARGV[4]
if ask.job then
  redis.call('DEL', ask.job)
  redis.call('HSET', ask.job, 'version', pool.version, 'state', 'admitted', 'attempt', 1, 'id', ask.id, 'task', ask.task,
    'tier', tier.name, 'queue', tier.queue, 'wanted', wanted.name, 'required', ask.required, 'reason', reason, 'wait', seconds,
    'admitted_at', now)
  if #message <= pool.message_limit then redis.call('HSET', ask.job, 'message', message) end
  redis.call('EXPIRE', ask.job, pool.job_life + ask.later)
  redis.call('ZADD', tier.waiting, now + ask.later * 1000, ask.id)
  redis.call('ZREMRANGEBYSCORE', tier.waiting, '-inf', now - pool.job_life * 1000)
end
if ask.idempotent then
  redis.call('HSET', ask.idempotent, 'id', ask.id, 'tier', tier.name, 'queue', tier.queue, 'reason', reason, 'wait', seconds)
  redis.call('EXPIRE', ask.idempotent, pool.idempotency_life + ask.later)
end
if ask.job and tier.name ~= wanted.name then
  redis.call('ZADD', wanted.spilled, now, ask.id)
  redis.call('ZREMRANGEBYSCORE', wanted.spilled, '-inf', now - pool.job_life * 1000)
  redis.call('EXPIRE', wanted.spilled, pool.job_life)
end
if ask.step then redis.call('LPUSH', tier.lists[ask.step], message) end
return answer
