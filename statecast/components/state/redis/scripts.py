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
--   event: {stream, head, body}
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
  redis.call('XADD', KEYS[before + event[1]], '*', 'head', event[2], 'body', event[3])
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
-- What is deferred of a slice are three keys, at `at` and behind it. A queue's name is that of its order key and that
-- of its topic, as keys.py tells; both say where they end, so that none is the beginning of another one.
--   states, a hash: queue -> 'attempts due pending oldest reason', where due is milliseconds or 'parked'
--   entries, a sorted set of score 0: '<queue><id>:<packed fields>', so that those of one queue stand together and in
--     commit order: ids are padded to 41 signs
--   due times, a sorted set of score 0: '<topic><due, 20 digits><order key>', so that those of one topic stand
--     together and the longest due is the first of them; none of what is parked
local function word_end(text, start)
  local digits = string.match(text, '^%d+', start)
  return start + #digits + digits + 1
end

local function padded(digits) return string.rep('0', 20 - #digits) .. digits end

local function padded_id(id)
  local milliseconds, counter = string.match(id, '^(%d+)-(%d+)$')
  return padded(milliseconds) .. '-' .. padded(counter)
end

local function state_of(at, queue)
  local state = redis.call('HGET', KEYS[at], queue)
  return string.match(state or '', '^(%d+) (%w+) (%d+) (%S+) (.*)$')
end

local function due_member(queue, due)
  local stop = word_end(queue, 1)
  return string.sub(queue, stop + 1) .. padded(due) .. string.sub(queue, 1, stop)
end

local function reschedule(at, queue, before, due)
  if before == due then return end
  if before and before ~= 'parked' then redis.call('ZREM', KEYS[at + 2], due_member(queue, before)) end
  if due and due ~= 'parked' then redis.call('ZADD', KEYS[at + 2], 0, due_member(queue, due)) end
end

local function note(at, queue, before, attempts, due, pending, oldest, reason)
  redis.call('HSET', KEYS[at], queue, table.concat({attempts, due, pending, oldest, reason}, ' '))
  reschedule(at, queue, before, due)
end

local function bounds(text) return '[' .. text, '(' .. text .. ';' end

local function due_after(now, pause) return pause and string.format('%d', now + pause) or 'parked' end

-- A key that holds something of another kind fails in these reads, before anything is written.
local function require_deferred(at)
  redis.call('HLEN', KEYS[at])
  redis.call('ZCARD', KEYS[at + 1])
  redis.call('ZCARD', KEYS[at + 2])
end
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

READ_LOG: Final = Script("""
-- KEYS: streams; ARGV: limit, bytes, position of each
-- returns for each the pieces in which it was read: {{entry, ...}, ...}
-- All streams take turns, with more at each: what some leave of the limit is for those that have more, and a few
-- large entries have used the bytes up before many of them are copied.
local left, room = tonumber(ARGV[1]), tonumber(ARGV[2])
local found, after, hungry = {}, {}, {}
for i = 1, #KEYS do found[i], after[i], hungry[i] = {}, ARGV[i + 2], i end

local function keep_to_the_room(entries)
  for i = 1, #entries do
    local fields = entries[i][2]
    room = room - #fields[2] - #fields[4]
    if room <= 0 then
      for j = #entries, i + 1, -1 do entries[j] = nil end
      break
    end
  end
end

local most = 1
while #hungry > 0 and left > 0 and room > 0 do
  local count = math.min(most, math.max(1, math.floor(left / #hungry)))
  local more = {}
  for _, i in ipairs(hungry) do
    if room <= 0 then break end
    local entries = redis.call('XRANGE', KEYS[i], '(' .. after[i], '+', 'COUNT', count)
    keep_to_the_room(entries)
    if #entries > 0 then
      left, after[i] = left - #entries, entries[#entries][1]
      found[i][#found[i] + 1] = entries
    end
    if #entries == count then more[#more + 1] = i end
  end
  hungry, most = more, math.min(2 * most, 32)
end
return found
""")

ADVANCE: Final = Script(
    _NOW
    + _EVEN_WHEN_FULL
    + _DEFERRED
    + """
-- KEYS: of each of n slices the lease, the stream and the three of what is deferred
-- ARGV: milliseconds, or '' to give up; deferrals; then owner, epoch, position ('': it stays), first id to keep of each
--   deferral: {number of its slice, queue, failure or false, {{id, packed fields}, ...}}
--   failure: {attempts, milliseconds or false, reason}
-- returns for each slice whether it was still mine
local n, deferrals = #KEYS / 5, cmsgpack.unpack(ARGV[2])
local mine, moves = {}, {}
for i = 1, n do
  local held = redis.call('HMGET', KEYS[5 * i - 4], 'owner', 'epoch', 'position')
  local position = ARGV[4 * i + 1]
  mine[i] = held[1] == ARGV[4 * i - 1] and held[2] == ARGV[4 * i]
  moves[i] = position ~= '' and padded_id(position) > padded_id(held[3] or '0-0')
  redis.call('XLEN', KEYS[5 * i - 3])
  require_deferred(5 * i - 2)
end

-- A position that moves on is the id of an entry, which is there until it is passed. If it is not, this is a server
-- that was promoted without it: its own next ids may be lower, and must not be taken for what was read. Deleting tells
-- it without a copy of the entry; trimming would delete it anyway.
for i = 1, n do
  if mine[i] and moves[i] then mine[i] = redis.call('XDEL', KEYS[5 * i - 3], ARGV[4 * i + 1]) == 1 end
end

local function defer(at, queue, failure, entries)
  for i = 1, #entries do
    local member = queue .. padded_id(entries[i][1])
    if redis.call('ZLEXCOUNT', KEYS[at + 1], '[' .. member .. ':', '(' .. member .. ';') == 0 then
      redis.call('ZADD', KEYS[at + 1], 0, member .. ':' .. entries[i][2])
    end
  end
  local first = padded_id(entries[1][1])
  local attempts, due, _, oldest, reason = state_of(at, queue)
  local before = due
  if not attempts then
    failure = failure or {0, 0, ''}
    attempts, due, oldest, reason = failure[1], due_after(now, failure[2]), first, failure[3]
  elseif first < oldest then
    oldest = first
  end
  note(at, queue, before, attempts, due, redis.call('ZLEXCOUNT', KEYS[at + 1], bounds(queue)), oldest, reason)
end

for i = 1, #deferrals do
  local slice, queue, failure, entries = unpack(deferrals[i])
  if mine[slice] then defer(5 * slice - 2, queue, failure, entries) end
end
for i = 1, n do
  if mine[i] then
    local lease, at = KEYS[5 * i - 4], 4 * i - 1
    if moves[i] then
      redis.call('HSET', lease, 'position', ARGV[at + 2])
      redis.call('XTRIM', KEYS[5 * i - 3], 'MINID', '=', ARGV[at + 3])
    end
    if ARGV[1] == '' then
      redis.call('HSET', lease, 'owner', '', 'expires_at', '0')
    else
      redis.call('HSET', lease, 'expires_at', string.format('%d', now + ARGV[1]))
    end
  end
  mine[i] = mine[i] and 1 or 0
end
return mine
"""
)

DEFERRED: Final = Script(
    _NOW
    + """
-- KEYS: the states of what is deferred of each slice
-- returns the time in milliseconds, then {queue, state, ...} of each slice
local found = {now}
for i = 1, #KEYS do found[i + 1] = redis.call('HGETALL', KEYS[i]) end
return found
"""
)

DUE_DEFERRED: Final = Script(
    _NOW
    + _DEFERRED
    + """
-- KEYS: the three of what is deferred of each slice; ARGV: limit, topics to leave out
-- returns {number of the slice, queue, state} of each, the longest due first
-- It goes from topic to topic, so that neither what is not due nor what is left out costs anything, however much it is.
local left_out, due = {}, {}
for i = 2, #ARGV do left_out[ARGV[i]] = true end

local function find_due(slice, topic)
  local set, high = KEYS[3 * slice], '(' .. topic .. padded(string.format('%d', now + 1))
  local found = redis.call('ZRANGEBYLEX', set, '[' .. topic, high, 'LIMIT', 0, ARGV[1])
  for i = 1, #found do
    local order_key = string.sub(found[i], #topic + 21)
    due[#due + 1] = {slice, order_key .. topic, tonumber(string.sub(found[i], #topic + 1, #topic + 20))}
  end
end

for slice = 1, #KEYS / 3 do
  local low = '-'
  while true do
    local first = redis.call('ZRANGEBYLEX', KEYS[3 * slice], low, '+', 'LIMIT', 0, 1)[1]
    if not first then break end
    local topic = string.sub(first, 1, word_end(first, word_end(first, 1) + 1))
    if not left_out[topic] then find_due(slice, topic) end
    low = '(' .. topic .. ';'
  end
end
table.sort(due, function(one, other) return one[3] < other[3] end)
for i = #due, ARGV[1] + 1, -1 do due[i] = nil end
for i = 1, #due do due[i][3] = redis.call('HGET', KEYS[3 * due[i][1] - 2], due[i][2]) end
return {now, due}
"""
)

READ_DEFERRED: Final = Script(
    _DEFERRED
    + """
-- KEYS: the entries of what is deferred of each slice
-- ARGV: limit of each queue, bytes of all, queues: {{number of its slice, queue}, ...}
-- returns for each {id, packed fields, ...}
local limit, room, queues = tonumber(ARGV[1]), tonumber(ARGV[2]), cmsgpack.unpack(ARGV[3])

local function read(set, queue)
  local entries, most = {}, 1
  local low, high = bounds(queue)
  while room > 0 and #entries < 2 * limit do
    local count = math.min(most, limit - #entries / 2)
    local found = redis.call('ZRANGEBYLEX', set, low, high, 'LIMIT', 0, count)
    for i = 1, #found do
      if room <= 0 then break end
      local id = string.sub(found[i], #queue + 1, #queue + 41)
      entries[#entries + 1] = id
      entries[#entries + 1] = string.sub(found[i], #queue + 43)
      room, low = room - #entries[#entries], '(' .. queue .. id .. ';'
    end
    if #found < count then break end
    most = math.min(2 * most, 32)
  end
  return entries
end

local found = {}
for i = 1, #queues do found[i] = read(KEYS[queues[i][1]], queues[i][2]) end
return found
"""
)

SETTLE_DEFERRED: Final = Script(
    _NOW
    + _EVEN_WHEN_FULL
    + _DEFERRED
    + """
-- KEYS: of each of n slices the lease and the three of what is deferred
-- ARGV: progress; then owner, epoch of each slice
--   progress: {number of its slice, queue, {attempts, milliseconds or false, reason}, {id that is published, ...}}
-- returns for each progress whether nothing is left
local mine = {}
for i = 1, #KEYS / 4 do
  local held = redis.call('HMGET', KEYS[4 * i - 3], 'owner', 'epoch')
  mine[i] = held[1] == ARGV[2 * i] and held[2] == ARGV[2 * i + 1]
  require_deferred(4 * i - 2)
end

local function settle(at, queue, failure, published)
  for i = 1, #published do
    local member = queue .. padded_id(published[i])
    redis.call('ZREMRANGEBYLEX', KEYS[at + 1], '[' .. member .. ':', '(' .. member .. ';')
  end
  local _, before = state_of(at, queue)
  local low, high = bounds(queue)
  local first = redis.call('ZRANGEBYLEX', KEYS[at + 1], low, high, 'LIMIT', 0, 1)[1]
  if not first then
    redis.call('HDEL', KEYS[at], queue)
    reschedule(at, queue, before, nil)
    return 1
  end
  local pending, oldest = redis.call('ZLEXCOUNT', KEYS[at + 1], low, high), string.sub(first, #queue + 1, #queue + 41)
  note(at, queue, before, failure[1], due_after(now, failure[2]), pending, oldest, failure[3])
  return 0
end

local progress = cmsgpack.unpack(ARGV[1])
for i = 1, #progress do
  local slice, queue, failure, published = unpack(progress[i])
  progress[i] = mine[slice] and settle(4 * slice - 2, queue, failure, published) or 0
end
return progress
"""
)

REPLAY: Final = Script(
    _NOW
    + _EVEN_WHEN_FULL
    + _DEFERRED
    + """
-- KEYS: the three of what is deferred of each slice; ARGV: the only order key, if not all; returns how many were parked
for at = 1, #KEYS, 3 do require_deferred(at) end
local replayed = 0
local function replay(at, queue)
  local attempts, due, pending, oldest, reason = state_of(at, queue)
  if due == 'parked' then
    note(at, queue, due, 0, due_after(now, 0), pending, oldest, reason)
    replayed = replayed + 1
  end
end

local function replay_order_key(at, order_key)
  local low, high = bounds(order_key)
  while true do
    local first = redis.call('ZRANGEBYLEX', KEYS[at + 1], low, high, 'LIMIT', 0, 1)[1]
    if not first then return end
    local queue = string.sub(first, 1, word_end(first, word_end(first, #order_key + 1) + 1))
    replay(at, queue)
    low = '(' .. queue .. ';'
  end
end

for at = 1, #KEYS, 3 do
  if ARGV[1] then
    replay_order_key(at, ARGV[1])
  else
    for _, queue in ipairs(redis.call('HKEYS', KEYS[at])) do replay(at, queue) end
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
