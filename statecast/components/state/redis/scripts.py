"""The Lua that runs on the server. Each script is one step that others see whole or not at all.

Lua does not roll back, so a script that writes finds out before its first write about everything that can refuse.
The server does its part: memory, a read-only replica, a broken disk are judged at a script's first write and never
after it. Time is the server's, and stands still while a script runs.
"""

from typing import Final

from statecast.components.redis.pipeline import Script

COMMIT: Final = Script("""
-- KEYS: n state keys, marks, claims, streams
-- ARGV[1]: {operations, marks' milliseconds, claims' tokens, number of streams, events, answers}
--   operation: {expected (false: anything, true: absent, text: this version), kind, value, milliseconds or false}
--   event: {stream, order key, event id, pubsub, topic, metadata, format, body}
--   answers, for the marks to keep: the number of an operation, whose version it is; what is no number as it is
-- returns {'ok', version or false for each operation} or {reason, index of the key, what it holds}
local commit = cmsgpack.unpack(ARGV[1])
local operations, marks, tokens, streams, events = commit[1], commit[2], commit[3], commit[4], commit[5]
local n, m, g = #operations, #marks, #tokens

for i = 1, m do
  if redis.call('EXISTS', KEYS[n + i]) == 1 then
    local answered = redis.pcall('GET', KEYS[n + i])
    return {'duplicate', i, type(answered) == 'string' and answered or ''}
  end
end
for i = 1, g do
  local token = redis.pcall('HGET', KEYS[n + m + i], 'token')
  if type(token) == 'table' then return {'corrupt', n + m + i, 'no claim'} end
  if token ~= tokens[i] then return {'fenced', i} end
end
local result, is_foreign, is_marked = {'ok'}, {}, {}
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
  result[i + 1] = false
  if operation[2] == 1 then
    if not current then
      result[i + 1] = '1'
    elseif #current <= 15 and string.find(current, '^%d+$') then
      result[i + 1] = string.format('%d', current + 1)
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

if m > 0 then
  local answers = commit[6]
  for i = 1, #answers do
    if type(answers[i]) == 'number' then answers[i] = result[answers[i] + 1] end
  end
  local answered = cmsgpack.pack(answers)
  for i = 1, m do redis.call('SET', KEYS[n + i], answered, 'PX', marks[i]) end
end
for i = 1, g do redis.call('HINCRBY', KEYS[n + m + i], 'seq', 1) end
for i = 1, n do
  local operation, key = operations[i], KEYS[i]
  local kind = operation[2]
  if kind == 1 then
    if is_foreign[i] then redis.call('DEL', key) end
    redis.call('HSET', key, 'data', operation[3], 'version', result[i + 1])
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

_EVEN_WHEN_FULL = """
-- A full server judges memory at a script's first write, if that may take some. What lets events leave has to go on
-- there, since it is what makes room: so it begins with a write that takes none, and changes nothing.
redis.call('PERSIST', KEYS[1])
"""

_DEFERRED = """
-- What is deferred of a slice are two keys. A hash, order key -> 'attempts due pending oldest reason', where due is
-- milliseconds or 'parked'. And a sorted set of '9:orders||1,id:packed fields', all of score 0, so that the entries of
-- one order key stand together and in commit order: their ids are padded to 41 signs.
local function lane_of(order_key) return #order_key .. ':' .. order_key .. ',' end

local function padded(id)
  local milliseconds, counter = string.match(id, '^(%d+)-(%d+)$')
  return string.rep('0', 20 - #milliseconds) .. milliseconds .. '-' .. string.rep('0', 20 - #counter) .. counter
end

local function note(hash, set, order_key, attempts, due, reason)
  local lane = lane_of(order_key)
  local low, high = '[' .. lane, '(' .. lane .. ';'
  local first = redis.call('ZRANGEBYLEX', set, low, high, 'LIMIT', 0, 1)[1]
  if not first then
    redis.call('HDEL', hash, order_key)
    return 0
  end
  local pending, oldest = redis.call('ZLEXCOUNT', set, low, high), string.sub(first, #lane + 1, #lane + 41)
  redis.call('HSET', hash, order_key, table.concat({attempts, due, pending, oldest, reason}, ' '))
  return 1
end

local function due_after(now, pause) return pause and string.format('%d', now + pause) or 'parked' end
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
    + _EVEN_WHEN_FULL
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
    + _EVEN_WHEN_FULL
    + _DEFERRED
    + """
-- KEYS: lease and stream of each of n slices, then both of what is deferred of those that deferrals are about
-- ARGV: milliseconds, or '' to give up; deferrals; then owner, epoch, position, first id to keep of each slice
--   deferral: {number of its slice, place of its keys, order key, failure or false, {{id, packed fields}, ...}}
--   failure: {attempts, milliseconds or false, reason}
-- returns for each slice whether it was still mine
local n = (#ARGV - 2) / 4
local mine = {}
-- A key that holds something of another kind fails in these reads, before anything is written.
for i = 1, n do
  local held = redis.call('HMGET', KEYS[2 * i - 1], 'owner', 'epoch')
  mine[i] = held[1] == ARGV[4 * i - 1] and held[2] == ARGV[4 * i] and 1 or 0
  redis.call('XLEN', KEYS[2 * i])
end
for i = 2 * n + 1, #KEYS, 2 do
  redis.call('HLEN', KEYS[i])
  redis.call('ZCARD', KEYS[i + 1])
end

local deferrals = cmsgpack.unpack(ARGV[2])
for i = 1, #deferrals do
  local slice, place, order_key, failure, entries = unpack(deferrals[i])
  if mine[slice] == 1 then
    local hash, set = KEYS[place], KEYS[place + 1]
    for j = 1, #entries do
      local member = lane_of(order_key) .. padded(entries[j][1])
      if redis.call('ZLEXCOUNT', set, '[' .. member .. ':', '(' .. member .. ';') == 0 then
        redis.call('ZADD', set, 0, member .. ':' .. entries[j][2])
      end
    end
    local attempts, due, reason = string.match(redis.call('HGET', hash, order_key) or '', '^(%d+) (%w+) %d+ %S+ (.*)$')
    if not attempts then
      failure = failure or {0, 0, ''}
      attempts, due, reason = failure[1], due_after(now, failure[2]), failure[3]
    end
    note(hash, set, order_key, attempts, due, reason)
  end
end
for i = 1, n do
  if mine[i] == 1 then
    local lease, at = KEYS[2 * i - 1], 4 * i - 1
    redis.call('HSET', lease, 'position', ARGV[at + 2])
    if ARGV[1] == '' then
      redis.call('HSET', lease, 'owner', '', 'expires_at', '0')
    else
      redis.call('HSET', lease, 'expires_at', string.format('%d', now + ARGV[1]))
    end
    redis.call('XTRIM', KEYS[2 * i], 'MINID', '=', ARGV[at + 3])
  end
end
return mine
"""
)

DEFERRED: Final = Script(
    _NOW
    + """
-- KEYS: the hash of what is deferred of each slice
-- returns the time in milliseconds, then {order key, state, ...} of each slice
local found = {now}
for i = 1, #KEYS do found[i + 1] = redis.call('HGETALL', KEYS[i]) end
return found
"""
)

READ_DEFERRED: Final = Script(
    _DEFERRED
    + """
-- KEYS: the entries of what is deferred of a slice; ARGV: order key, limit; returns {id, packed fields, ...}
local lane = lane_of(ARGV[1])
local found = redis.call('ZRANGEBYLEX', KEYS[1], '[' .. lane, '(' .. lane .. ';', 'LIMIT', 0, ARGV[2])
local entries = {}
for i = 1, #found do
  entries[2 * i - 1] = string.sub(found[i], #lane + 1, #lane + 41)
  entries[2 * i] = string.sub(found[i], #lane + 43)
end
return entries
"""
)

SETTLE_DEFERRED: Final = Script(
    _NOW
    + _EVEN_WHEN_FULL
    + _DEFERRED
    + """
-- KEYS: lease, both of what is deferred of its slice; ARGV: owner, epoch, order key, {attempts, milliseconds or false,
-- reason}, ids that are published; returns whether any is left
local held = redis.call('HMGET', KEYS[1], 'owner', 'epoch')
if held[1] ~= ARGV[1] or held[2] ~= ARGV[2] then return 1 end
redis.call('HLEN', KEYS[2])
redis.call('ZCARD', KEYS[3])
local failure = cmsgpack.unpack(ARGV[4])

for i = 5, #ARGV do
  local member = lane_of(ARGV[3]) .. padded(ARGV[i])
  redis.call('ZREMRANGEBYLEX', KEYS[3], '[' .. member .. ':', '(' .. member .. ';')
end
return note(KEYS[2], KEYS[3], ARGV[3], failure[1], due_after(now, failure[2]), failure[3])
"""
)

REPLAY: Final = Script(
    _NOW
    + _EVEN_WHEN_FULL
    + """
-- KEYS: the hash of what is deferred of each slice; ARGV: the only order key, if not all; returns how many were parked
local replayed = 0
local function replay(hash, order_key, state)
  local rest = string.match(state or '', '^%d+ parked (.*)$')
  if rest then
    redis.call('HSET', hash, order_key, string.format('0 %d ', now) .. rest)
    replayed = replayed + 1
  end
end
for i = 1, #KEYS do
  if ARGV[1] then
    replay(KEYS[i], ARGV[1], redis.call('HGET', KEYS[i], ARGV[1]))
  else
    local held = redis.call('HGETALL', KEYS[i])
    for j = 1, #held, 2 do replay(KEYS[i], held[j], held[j + 1]) end
  end
end
return replayed
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
