-- What the scripts share that end an attempt: ledger.script puts it before move.lua, readmit.lua and settle.lua.
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)

-- Count how an attempt of a tier has ended, unless it began before "since", from when on the operator wants them counted. The
-- first that counts from a new "since" on clears what was counted before. Returns whether it was counted.
local function count_attempt(attempts, checkpoint, began, how, life)
  local since = redis.call('HGET', checkpoint, 'since') or '0'
  if began < tonumber(since) then return false end
  if redis.call('HGET', attempts, 'since') ~= since then
    redis.call('DEL', attempts)
    redis.call('HSET', attempts, 'since', since)
  end
  redis.call('HINCRBY', attempts, how, 1)
  redis.call('EXPIRE', attempts, life)
  return true
end

-- Write down how a run has ended, in a word, and what it raised; nothing while it goes on.
local function end_run(job, number, how, raised)
  local run = how ~= '' and number and redis.call('HGET', job, 'run:' .. number)
  if not run then return end
  run = cjson.decode(run)
  run.ended, run.how, run.error = now, how, raised ~= '' and raised or nil
  redis.call('HSET', job, 'run:' .. number, cjson.encode(run))
end

