-- Who a person is, and where the person belongs. The rules are those of
-- domain/person.py; here is how it is stored.
--
-- lock: user -> tenant.  users, of:<tenant>: the users in order.  owners: tenant -> how many.
-- change: user -> "second fraction kind" of the last change.  h:<user>: the history, oldest first.
-- phone: LID -> phone, the LID itself if it lost its phone.  lid: phone -> LID.  sighted: LID -> when.

local SHOWN = {id = 1, at = 2, user = 3, kind = 4, from = 5, to = 6, second = 7, fraction = 8,
               message_id = 9, why = 10}

local function is_lid(user) return string.sub(user, -4) == '@lid' end

local function phone_of(lid)
  local phone = hget('phone', lid)
  if phone and phone ~= lid then return phone end
end

local function lid_of(phone) return hget('lid', phone) end

local function known_as(user)
  return is_lid(user) and phone_of(user) or user
end

local function ids_of(user)
  local known = known_as(user)
  local lid = not is_lid(known) and lid_of(known)
  if lid then return {known, lid} end
  return {known}
end

local function last_change(user)
  local found = hget('change', user)
  if not found then return NEVER, nil end
  local second, fraction, kind = string.match(found, '^(%S+) (%S+) (%S+)$')
  return {second, fraction}, kind
end

local function note_change(user, second, fraction, kind)
  if second ~= '' then hset('change', user, second .. ' ' .. fraction .. ' ' .. kind) end
end

-- changed: the moment of the change of the lock; nil if it did not change.
local function record(at, user, kind, from, to, changed, message_id, why)
  local id = string.format('%d', count('numbers', 'history_id', 1))
  local second, fraction = unpack(changed or {'', ''})
  rpush('h:' .. user, cjson.encode({
    id, at, user, kind, from or '', to or '', second, fraction, message_id or '', why or '',
  }))
  note_change(user, second, fraction, kind)
end

local function set_lock(user, tenant)
  local before = hget('lock', user)
  if before then
    count('owners', before, -1)
    zrem('of:' .. before, user)
  end
  if tenant then
    hset('lock', user, tenant)
    count('owners', tenant, 1)
    zadd('of:' .. tenant, 0, user)
    zadd('users', 0, user)
  else
    hdel('lock', user)
    zrem('users', user)
  end
end

-- Entries of the history that are looked at together: a person may have tens of thousands.
local SOME_LINES = 100

-- The changes of user's lock after moment, and the last one before it, as {second, fraction, id,
-- tenant}, the newest first; '' if there are none.
local function changes_since(user, moment)
  local found, last = {}, redis.call('LLEN', P .. 'h:' .. user) - 1
  while last >= 0 do
    local from = math.max(0, last - SOME_LINES + 1)
    local some = redis.call('LRANGE', P .. 'h:' .. user, from, last)
    for place = #some, 1, -1 do
      local row = cjson.decode(some[place])
      if row[SHOWN.second] ~= '' then
        table.insert(found, {row[SHOWN.second], row[SHOWN.fraction], row[SHOWN.id], row[SHOWN.to]})
        if not earlier(moment, {row[SHOWN.second], row[SHOWN.fraction]}) then return found end
      end
    end
    last = from - 1
  end
  return #found > 0 and found or ''
end

local move_lines, drop_all_held, add_delivery, rename_letters, rename_held, drop_waiting
