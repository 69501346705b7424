"""The Lua that runs on the server. Each script is one step that others see whole or not at all.

Lua does not roll back, so a script that writes finds out before its first write about everything that can refuse.
The server does its part: memory, a read-only replica, a broken disk are judged at a script's first write and never
after it. Time is the server's, and stands still while a script runs.
"""

from typing import Final

from statecast.components.redis.pipeline import Script

COMMIT: Final = Script("""
-- KEYS: n state keys, marks, claims, streams
-- ARGV[1]: {operations, marks' milliseconds, claims' tokens, number of streams, events}
--   operation: {expected (false: anything, true: absent, text: this version), kind, value, milliseconds or false}
--   event: {stream, order key, event id, pubsub, topic, metadata, format, body}
-- returns {'ok', version or false for each operation} or {reason, index of the key, what it holds}
local commit = cmsgpack.unpack(ARGV[1])
local operations, marks, tokens, streams, events = commit[1], commit[2], commit[3], commit[4], commit[5]
local n, m, g = #operations, #marks, #tokens

for i = 1, m do
  if redis.call('EXISTS', KEYS[n + i]) == 1 then return {'duplicate', i} end
end
for i = 1, g do
  local token = redis.pcall('HGET', KEYS[n + m + i], 'token')
  if type(token) == 'table' then return {'corrupt', n + m + i, 'no claim'} end
  if token ~= tokens[i] then return {'fenced', i} end
end
local version, is_foreign, is_marked = {}, {}, {}
for i = 1, n do
  local operation = operations[i]
  local held = redis.pcall('HMGET', KEYS[i], 'version', 'first-write')
  local current = held[1] or false
  if held.err then current, is_foreign[i] = false, true end
  local expected = operation[1]
  if expected == true then
    if current or redis.call('EXISTS', KEYS[i]) == 1 then return {'etag', i} end
  elseif expected and expected ~= current then
    return {'etag', i}
  end
  if operation[2] == 1 then
    if not current then
      version[i] = 0
    elseif #current <= 15 and string.find(current, '^%d+$') then
      version[i] = tonumber(current)
    else
      return {'corrupt', i, 'a version that is no number'}
    end
    is_marked[i] = not is_foreign[i] and held[2]
  end
end
local before = n + m + g
for i = before + 1, before + streams do
  local kind = redis.call('TYPE', KEYS[i]).ok
  if kind ~= 'stream' and kind ~= 'none' then return {'corrupt', i, 'a value of type ' .. kind} end
end

for i = 1, m do redis.call('SET', KEYS[n + i], '', 'PX', marks[i]) end
for i = 1, g do redis.call('HINCRBY', KEYS[n + m + i], 'seq', 1) end
local result = {'ok'}
for i = 1, n do
  local operation, key, written = operations[i], KEYS[i], false
  local kind = operation[2]
  if kind == 1 then
    written = string.format('%d', version[i] + 1)
    if is_foreign[i] then redis.call('DEL', key) end
    redis.call('HSET', key, 'data', operation[3], 'version', written)
    -- Dapr's marker makes its own later writes without an etag fail for ever.
    if is_marked[i] then redis.call('HDEL', key, 'first-write') end
    if operation[4] then
      redis.call('PEXPIRE', key, operation[4])
    elseif operation[1] ~= true then
      redis.call('PERSIST', key)
    end
  elseif kind == 2 then
    redis.call('DEL', key)
  end
  result[i + 1] = written
end
for i = 1, #events do
  local event = events[i]
  redis.call('XADD', KEYS[before + event[1]], '*', 'key', event[2], 'id', event[3], 'pubsub', event[4],
    'topic', event[5], 'metadata', event[6], 'format', event[7], 'body', event[8])
end
return result
""")

READ: Final = Script("""
-- KEYS: state keys; returns for each: false, {data, version, expiry in milliseconds or -1}, or {what it holds}
local now
local function expiry(key)
  local left = redis.call('PTTL', key)
  if left < 0 then return -1 end
  if not now then
    local time = redis.call('TIME')
    now = time[1] * 1000 + math.floor(time[2] / 1000)
  end
  return now + left
end
local found = {}
for i = 1, #KEYS do
  local key = KEYS[i]
  local held = redis.pcall('HMGET', key, 'data', 'version')
  if held.err then
    local text = redis.pcall('GET', key)
    if type(text) == 'table' then
      found[i] = {'a value of type ' .. redis.call('TYPE', key).ok}
    else
      found[i] = {text, '', expiry(key)}
    end
  elseif held[1] then
    found[i] = {held[1], held[2] or '', expiry(key)}
  else
    found[i] = redis.call('EXISTS', key) == 1 and {'a hash without the field data'}
  end
end
return found
""")

REHEARSE: Final = Script("""
-- KEYS: a key of no use; tries every command that the commit writes with, so that a missing right shows now
local key = KEYS[1]
redis.call('DEL', key)
redis.call('HSET', key, 'data', '', 'version', '1')
redis.call('HINCRBY', key, 'seq', 1)
redis.call('HDEL', key, 'first-write')
redis.call('PEXPIRE', key, '1000')
redis.call('PERSIST', key)
redis.call('SET', key, '', 'PX', '1000')
redis.call('DEL', key)
redis.call('XADD', key, '*', 'key', '')
redis.call('DEL', key)
return 'ok'
""")

CLAIM: Final = Script("""
-- KEYS: the claim; ARGV: the new token
redis.call('HSET', KEYS[1], 'token', ARGV[1])
return 'ok'
""")

RELEASE_CLAIM: Final = Script("""
-- KEYS: the claim; ARGV: the token
if redis.call('HGET', KEYS[1], 'token') == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
""")

_NOW = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
"""

HEARTBEAT: Final = Script(
    _NOW
    + """
-- KEYS: the relays; ARGV: owner, milliseconds
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
redis.call('ZADD', KEYS[1], string.format('%d', now + ARGV[2]), ARGV[1])
return redis.call('ZCARD', KEYS[1])
"""
)

ACQUIRE: Final = Script(
    _NOW
    + """
-- KEYS: the lease of every slice; ARGV: owner, limit, milliseconds; returns {{slice, epoch, position}, ...}
local leased = {}
for i = 1, #KEYS do
  if #leased >= tonumber(ARGV[2]) then break end
  local held = redis.call('HMGET', KEYS[i], 'expires_at', 'position')
  if not held[1] or tonumber(held[1]) <= now then
    redis.call('HSET', KEYS[i], 'owner', ARGV[1], 'expires_at', string.format('%d', now + ARGV[3]))
    leased[#leased + 1] = {i - 1, redis.call('HINCRBY', KEYS[i], 'epoch', 1), held[2] or '0-0'}
  end
end
return leased
"""
)

ADVANCE: Final = Script(
    _NOW
    + """
-- KEYS: lease and stream of each slice; ARGV: milliseconds, or '' to give up; then owner, epoch, position, first id
-- to keep of each; returns for each whether it was still mine
local mine = {}
for i = 1, #KEYS / 2 do
  local lease, at = KEYS[2 * i - 1], 4 * i - 2
  local held = redis.call('HMGET', lease, 'owner', 'epoch')
  if held[1] == ARGV[at] and held[2] == ARGV[at + 1] then
    redis.call('HSET', lease, 'position', ARGV[at + 2])
    if ARGV[1] == '' then
      redis.call('HSET', lease, 'owner', '', 'expires_at', '0')
    else
      redis.call('HSET', lease, 'expires_at', string.format('%d', now + ARGV[1]))
    end
    redis.call('XTRIM', KEYS[2 * i], 'MINID', '=', ARGV[at + 3])
    mine[i] = 1
  else
    mine[i] = 0
  end
end
return mine
"""
)

STATUS: Final = Script(
    _NOW
    + """
-- KEYS: lease and stream of each slice; returns for each {owner or '', epoch, position, pending, first id or ''}
local slices = {}
for i = 1, #KEYS / 2 do
  local held = redis.call('HMGET', KEYS[2 * i - 1], 'owner', 'epoch', 'position', 'expires_at')
  local is_live = held[4] and tonumber(held[4]) > now
  local first = redis.call('XRANGE', KEYS[2 * i], '-', '+', 'COUNT', 1)[1]
  slices[i] = {is_live and held[1] or '', held[2] or '0', held[3] or '0-0', redis.call('XLEN', KEYS[2 * i]),
    first and first[1] or ''}
end
return slices
"""
)
