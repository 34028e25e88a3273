-- What all operations build on. KEYS[1] is "gw:{session}"; every key begins with it, so that a
-- script touches one slot of a cluster. A call carries operations in threes, see call.lua: the name
-- in ops, arguments as JSON, a body. Times are Unix seconds as decimal texts: Redis would round a
-- number's. store: the id of the store that the session belongs to, there once a router knows it.
-- closed: there while the session is migrated, and from then on.
-- Redis 6.2 replicates what a script did, not the script, so TIME and chance are allowed.
-- The files are one script, in the order of scripts.py: a function that is used before its file comes
-- is declared where it is first needed, and filled in its own.

local P = KEYS[1] .. ':'
local clock = redis.call('TIME')
local NOW = tonumber(clock[1]) + tonumber(clock[2]) / 1e6

local function text(number) return string.format('%.17g', number) end
local function hget(key, field) return redis.call('HGET', P .. key, field) or nil end

-- Facts that operations of one call share, counters above all: read once, cached in memory, and
-- written at its end. Code that reads such a hash as a whole calls write_cached() before.

local cached, changed = {}, {} -- key -> field -> text, '' where there is none; what is to be written
local undo = {} -- what to put back if the operation fails

local function cget(key, field)
  cached[key] = cached[key] or {}
  local value = cached[key][field]
  if value == nil then
    value = hget(key, field) or ''
    cached[key][field] = value
  end
  if value ~= '' then return value end
end

local function cset(key, field, value)
  table.insert(undo, {key, field, cget(key, field) or ''})
  cached[key][field] = value
  changed[key] = changed[key] or {}
  changed[key][field] = true
end

local function write_cached()
  for key, fields in pairs(changed) do
    for field in pairs(fields) do
      local value = cached[key][field]
      if value ~= '' then
        redis.call('HSET', P .. key, field, value)
      else
        redis.call('HDEL', P .. key, field)
      end
    end
  end
  changed = {}
end

-- A counter; at 0 it is not there.
local function count(key, field, by)
  local value = tonumber(cget(key, field) or 0) + by
  cset(key, field, value ~= 0 and string.format('%d', value) or '')
  return value
end

-- The field has the greatest of all values, or the least.
local function greatest(key, field, value)
  if tonumber(value) > tonumber(cget(key, field) or '-inf') then cset(key, field, value) end
end
local function least(key, field, value)
  if tonumber(value) < tonumber(cget(key, field) or 'inf') then cset(key, field, value) end
end

local function hset(key, field, value) redis.call('HSET', P .. key, field, value) end
local function hdel(key, field) return redis.call('HDEL', P .. key, field) end
local function zscore(key, member) return redis.call('ZSCORE', P .. key, member) or nil end
local function zadd(key, score, member) redis.call('ZADD', P .. key, score, member) end
local function zrem(key, member) return redis.call('ZREM', P .. key, member) end
local function zall(key) return redis.call('ZRANGE', P .. key, 0, -1) end
local function sadd(key, member) redis.call('SADD', P .. key, member) end
local function srem(key, member) redis.call('SREM', P .. key, member) end

-- What makes room must go on when memory is full: Redis asks only before a script's first write.
local function although_full() redis.call('DEL', P .. 'nothing') end

local ops = {}
