-- Put a message that is in flight back at the head of its queue, under a fresh delivery tag; nothing on the ledger changes.
-- Of several callers one wins.
--
-- KEYS: unacked hash, unacked index, queue list. ARGV: delivery tag, the message.
-- Returns 1 when it was put back, 0 when it is no longer in flight under that tag.
redis.call('ZREM', KEYS[2], ARGV[1])
if redis.call('HDEL', KEYS[1], ARGV[1]) == 0 then return 0 end
redis.call('RPUSH', KEYS[3], ARGV[2])
return 1
