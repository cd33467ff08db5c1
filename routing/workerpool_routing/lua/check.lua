-- A write that changes nothing: whether Redis takes any, and any that needs memory.
--
-- KEYS: unacked index.
return redis.call('ZADD', KEYS[1], 'XX', 0, '')
