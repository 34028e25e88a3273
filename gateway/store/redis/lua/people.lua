-- Who a person is, and where the person belongs. As in files.py: the newer sighting wins, the lock
-- follows the LID, of two locks the newer stays.
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

-- Lines of the history that are looked at together: a person may have tens of thousands.
local SOME_LINES = 100

-- The newest change of user's lock that is no later than moment, as its line: a later line never
-- tells of an earlier change.
local function change_at(user, moment)
  local last = redis.call('LLEN', P .. 'h:' .. user) - 1
  while last >= 0 do
    local from = math.max(0, last - SOME_LINES + 1)
    local some = redis.call('LRANGE', P .. 'h:' .. user, from, last)
    for place = #some, 1, -1 do
      local row = cjson.decode(some[place])
      if row[SHOWN.second] ~= '' and not earlier(moment, {row[SHOWN.second], row[SHOWN.fraction]}) then
        return row
      end
    end
    last = from - 1
  end
end

local function tenant_at(one, other, moment)
  local best = nil
  for _, user in ipairs({one, other}) do
    local row = change_at(user, moment)
    if row and best then
      local mine = {row[SHOWN.second], row[SHOWN.fraction]}
      local theirs = {best[SHOWN.second], best[SHOWN.fraction]}
      local newer = tonumber(row[SHOWN.id]) > tonumber(best[SHOWN.id])
      if earlier(mine, theirs) or not earlier(theirs, mine) and not newer then row = best end
    end
    best = row or best
  end
  if best and best[SHOWN.to] ~= '' then return best[SHOWN.to] end
end

local move_lines, take_held, add_delivery, rename_help, rename_letters, rename_held

local function melt(old, new, shown)
  local source = shown.asked and ', says WAHA' or ''
  local was, is = hget('lock', old), hget('lock', new)
  local was_changed, was_kind = last_change(old)
  local is_changed, is_kind = last_change(new)
  local changed = latest(is_changed, was_changed)
  -- What was decided for either id counts, and the newer decision wins: a lock, or an unlock.
  local stays, decided = nil, nil
  if is or is_kind == 'unlocked' then stays, decided = is, is_changed end
  if was or was_kind == 'unlocked' then
    if not decided or earlier(decided, was_changed) then stays = was end
  end
  if was then
    set_lock(old, nil)
    record(text(NOW), old, 'merged', was, nil, changed, shown.message_id, 'is ' .. new .. source)
  end
  -- Whose history names whom: an erasure must find it.
  sadd('named:' .. old, new)
  sadd('named:' .. new, old)
  if stays ~= is then set_lock(new, stays) end
  if was or earlier(is_changed, changed) then
    record(text(NOW), new, 'merged', is, stays, changed, shown.message_id, 'was ' .. old .. source)
  end
  move_lines(old, new)
  rename_letters(old, new)
  rename_held(old, new)
  rename_help(old, new)
  if stays then
    local alias = not is_lid(new) and lid_of(new) or nil
    for _, held in ipairs(take_held(new)) do
      local tenant = tenant_at(new, old, held.sent)
      if tenant then add_delivery(held, tenant, new, alias) end
    end
  end
end

local function sight(lid, phone, shown)
  local before, at = hget('phone', lid), tonumber(shown.at)
  if before == phone then return end
  local owner = lid_of(phone)
  local newest = 0
  if before then newest = math.max(newest, tonumber(hget('sighted', lid))) end
  if owner then newest = math.max(newest, tonumber(hget('sighted', owner))) end
  if at < newest then return end
  if owner then -- the number changed hands: whoever had it is known by LID only
    hset('phone', owner, owner) -- the time stays: an older sighting that comes late must not win
    hdel('lid', phone)
    melt(phone, owner, shown)
  end
  if before and before ~= lid then hdel('lid', before) end
  hset('phone', lid, phone)
  hset('lid', phone, lid)
  hset('sighted', lid, shown.at)
  if before and before ~= lid then melt(before, phone, shown) end
  melt(lid, phone, shown)
end

-- The id to keep the person under, and the other one; what the message shows is learnt.
local function person(message)
  local phone, lid = message.phone, message.lid
  if message.identity_link then sight(lid, phone, message.identity_link) end
  if lid then phone = phone_of(lid) elseif phone then lid = lid_of(phone) end
  local user, alias = lid, nil
  if phone then user, alias = phone, lid end
  if alias and hget('lock', alias) then -- a lock from elsewhere may stand under it
    melt(alias, user, {message_id = message.message_id})
  end
  return user, alias
end

function ops.learn(args)
  sight(args.lid, args.phone, args.identity_link)
  return {}
end

function ops.lock_of(args)
  local user = known_as(args.user)
  local changed = last_change(user)
  return {user, hget('lock', user) or '', changed[1], changed[2]}
end
