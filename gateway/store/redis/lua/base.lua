-- What all operations build on. KEYS[1] is "gw:{session}"; every key begins with it, so that a
-- script touches one slot of a cluster. A call carries operations in threes, see call.lua: the name
-- in ops, arguments as JSON, a body. Times are Unix seconds as decimal texts: Redis would round a
-- number's. store: the id of the store that the session belongs to, there once a router knows it.
-- Redis 6.2 replicates what a script did, not the script, so TIME and chance are allowed.
-- The files are one script, in the order of scripts.py: a function that is used before its file comes
-- is declared where it is first needed, and filled in its own.

local P = KEYS[1] .. ':'
local clock = redis.call('TIME')
local NOW = tonumber(clock[1]) + tonumber(clock[2]) / 1e6

local function text(number) return string.format('%.17g', number) end

local function hget(key, field) return redis.call('HGET', P .. key, field) or nil end

-- Facts that operations of one call share, counters above all: read once, kept in memory, and
-- written at its end. Whoever reads such a hash as a whole calls write_kept() before.

local kept, changed = {}, {} -- key -> field -> text, '' where there is none; what is to be written

local function kget(key, field)
  kept[key] = kept[key] or {}
  local value = kept[key][field]
  if value == nil then
    value = hget(key, field) or ''
    kept[key][field] = value
  end
  if value ~= '' then return value end
end

local function kset(key, field, value)
  kget(key, field)
  kept[key][field] = value
  changed[key] = changed[key] or {}
  changed[key][field] = true
end

local function write_kept()
  for key, fields in pairs(changed) do
    local some, none = {}, {}
    for field in pairs(fields) do
      local value = kept[key][field]
      if value == '' then
        table.insert(none, field)
      else
        table.insert(some, field)
        table.insert(some, value)
      end
      if #some >= 1000 then
        redis.call('HSET', P .. key, unpack(some))
        some = {}
      end
      if #none >= 1000 then
        redis.call('HDEL', P .. key, unpack(none))
        none = {}
      end
    end
    if #some > 0 then redis.call('HSET', P .. key, unpack(some)) end
    if #none > 0 then redis.call('HDEL', P .. key, unpack(none)) end
  end
  changed = {}
end

-- A counter; at 0 it is not there.
local function count(key, field, by)
  local value = tonumber(kget(key, field) or 0) + by
  kset(key, field, value ~= 0 and string.format('%d', value) or '')
  return value
end

local function hset(key, field, value) redis.call('HSET', P .. key, field, value) end

local function hdel(key, field) return redis.call('HDEL', P .. key, field) end

local function zscore(key, member) return redis.call('ZSCORE', P .. key, member) or nil end

local function zadd(key, score, member) redis.call('ZADD', P .. key, score, member) end

local function zrem(key, member) return redis.call('ZREM', P .. key, member) end

local function sadd(key, member) redis.call('SADD', P .. key, member) end

local function srem(key, member) redis.call('SREM', P .. key, member) end

local function rpush(key, value) redis.call('RPUSH', P .. key, value) end

local function lrange(key) return redis.call('LRANGE', P .. key, 0, -1) end

local function del(key) redis.call('DEL', P .. key) end

-- A moment is two texts: whole second, and the time within it as a Unix time.

local function earlier(one, other)
  local a, b = tonumber(one[1]), tonumber(other[1])
  if a ~= b then return a < b end
  return tonumber(one[2]) < tonumber(other[2])
end

local NEVER = {'0', '0'}

local function moment_now() return {string.format('%d', math.floor(NOW)), text(NOW)} end

local function latest(one, other) if earlier(one, other) then return other end return one end

-- What makes room must go on when memory is full: Redis asks only before a script's first write.
local function although_full() redis.call('DEL', P .. 'nothing') end

local ops = {}
