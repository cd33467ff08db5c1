-- An attempt ends, or enters "finishing" on its way there, if it is still the one that the ledger knows.
--
-- KEYS end with every spilled:<tier>. tag, owner: who has claimed it; '' before a claim. held_as: the delivery tag of a message
-- to acknowledge, whatever the ledger says. life, count_life: of the entry, and of what is counted. The rest is the result, or
-- nothing: its life in seconds (0: for ever) and its database ('': the ledger's own).
-- Returns 1 when it moved, or had moved and only the answer was lost; -1 when the ledger no longer knows the job (Redis came back
-- without it, or it ended long ago): nothing is stored; 0 when another attempt owns the job now.
local job, held, waiting, unacked, index, service, served, attempts, checkpoint, outlier = unpack(KEYS)
local id, attempt, tag, owner, from, to, life, count_life, how, raised, held_as,
  result, value, result_life, database = unpack(ARGV)
local function acknowledge(delivery)
  if delivery == '' then return end
  redis.call('HDEL', unacked, delivery)
  redis.call('ZREM', index, delivery)
end
acknowledge(held_as)

local state, latest, claimed_as, claimed_by, runs, claimed_at, task, suspect, suspect_since, suspect_worker = unpack(redis.call(
  'HMGET', job, 'state', 'attempt', 'tag', 'owner', 'runs', 'claimed_at', 'task', 'suspect', 'suspect_since', 'suspect_worker'))
if not state then
  redis.call('SREM', held, id)
  return -1
end
if latest ~= attempt or (claimed_as or '') ~= tag or (claimed_by or '') ~= owner then return 0 end
if state == to then return 1 end
if state ~= from then return 0 end
redis.call('HSET', job, 'state', to, to .. '_at', now)
redis.call('EXPIRE', job, life)
end_run(job, runs, how, raised)

local good = to == 'done' or (to == 'finishing' and how == 'done')
local began = tonumber(claimed_at)
local seconds = began and math.max(0, now - began) / 1000
if from == 'claimed' and began then
  local jobs, mean = redis.call('HINCRBY', served, 'jobs', 1), tonumber(redis.call('HGET', served, 'mean') or seconds)
  redis.call('HINCRBYFLOAT', served, 'seconds', seconds)
  redis.call('HINCRBYFLOAT', served, 'squares', seconds * seconds)
  -- A plain mean at first: a worker's first job takes longer than those that follow, and must not stand for all.
  redis.call('HSET', served, 'mean', string.format('%.6f', mean + (seconds - mean) / math.min(jobs, 100)))
  redis.call('EXPIRE', served, count_life)
end
if from == 'claimed' and good then
  redis.call('HINCRBY', served, 'succeeded', 1)
  redis.call('DEL', outlier)
  count_attempt(attempts, checkpoint, began or 0, 'succeeded', count_life)
end
-- How the job ends here says whether the tier was at fault on which it failed before; one that expires says nothing.
if suspect then
  redis.call('HDEL', job, 'suspect', 'suspect_since', 'suspect_worker')
  if good and redis.call('EXISTS', suspect_worker) == 1 then redis.call('HINCRBY', suspect_worker, 'row', 1) end
  if (tonumber(suspect_since) or 0) >= (tonumber(redis.call('HGET', suspect, 'since')) or 0) then
    redis.call('HINCRBY', suspect, to == 'expired' and 'failed' or good and 'confirmed' or 'refuted', to == 'expired' and -1 or 1)
    redis.call('EXPIRE', suspect, count_life)
  end
end

if to ~= 'finishing' then
  redis.call('SREM', held, id)
  redis.call('ZREM', waiting, id)
  redis.call('HDEL', job, 'message', 'missing_at')
  for i = 11, #KEYS do redis.call('ZREM', KEYS[i], id) end
  -- The delivery ends with the job: a worker that lost its connection meanwhile could not acknowledge it any more.
  acknowledge(tag)
  if to ~= 'expired' and tag ~= '' and began and task then
    local before = tonumber(redis.call('HGET', service, task)) or seconds
    redis.call('HSET', service, task, string.format('%.3f', 0.8 * before + 0.2 * seconds))
  end
end

if result then
  if database ~= '' then redis.call('SELECT', database) end
  if result_life == '0' then
    redis.call('SET', result, value)
  else
    redis.call('SETEX', result, result_life, value)
  end
  redis.call('PUBLISH', result, value)
end
return 1
