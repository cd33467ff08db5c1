-- Put a message that is in flight back at the head of its queue, under a fresh delivery tag; the state on the ledger stays.
-- Of several callers one wins.
--
-- attempt, tier, retries: as the message has them, and the tier whose workers held it. unrecorded: 1 when it may be in no key,
-- because the worker that took it could not record it.
-- Returns 1 when it was put back, 0 when it is no longer in flight under that tag.
local unacked, index, list, job, waiting = unpack(KEYS)
local tag, message, queue, id, attempt, tier, retries, unrecorded = unpack(ARGV)
redis.call('ZREM', index, tag)
if redis.call('HDEL', unacked, tag) == 0 and unrecorded ~= '1' then return 0 end
redis.call('RPUSH', list, message)
-- Whoever takes it next may die before recording it: then the sweep publishes it again from the ledger.
-- The copy of an earlier attempt or retry, or of a job that has moved to another tier, says nothing about the one that counts.
if redis.call('TYPE', job).ok ~= 'hash' then return 1 end
local state, latest, left, asked = unpack(redis.call('HMGET', job, 'state', 'attempt', 'left', 'retries'))
local has_left = string.find(' ' .. (left or '') .. ' ', ' ' .. tier .. ' ', 1, true)
if (state == 'admitted' or state == 'finishing') and latest == attempt and not has_left
  and (tonumber(asked) or 0) <= tonumber(retries) then
  redis.call('HSET', job, 'message', message, 'queue', queue)
  redis.call('ZADD', waiting, 'GT', redis.call('TIME')[1] * 1000, id)
end
return 1
