-- Accepting, and what waits for a link.
--
-- seen:<key>: "phone,lid,routed;…" of each person who had it, ids as hashes, for 48 hours and more.
-- held:<user>: messages, oldest first.  held_until: "user" -> when the newest of them arrived.
-- held_key: idempotency key -> user.  help: user -> "queued sent".  help_waits: user -> queued.

local SEEN_SECONDS = 259200

local function hashed(id) return id and string.sub(redis.sha1hex(id), 1, 16) or '' end

local function same_person(one, other)
  if one[1] ~= '' and one[1] == other[1] or one[2] ~= '' and one[2] == other[2] then
    return 'yes'
  end
  if one[1] ~= '' and other[1] ~= '' or one[2] ~= '' and other[2] ~= '' then return 'no' end
  return 'perhaps'
end

-- 'itself', 'anothers', 'nobodys' or 'nothing': see seen.Found.
local function find_seen(message, ids)
  local found = 'nothing'
  for entry in string.gmatch(redis.call('GET', P .. 'seen:' .. message.seen) or '', '[^;]+') do
    local phone, lid, routed = string.match(entry, '^([^,]*),([^,]*),(.)$')
    local same = message.twins and same_person({phone, lid}, ids) or 'yes'
    if same == 'yes' or same == 'perhaps' and routed == '1' then return 'itself' end
    if same == 'no' then found = 'anothers'
    elseif found == 'nothing' then found = 'nobodys' end
  end
  return found
end

local function add_seen(message, ids, routed)
  local key = 'seen:' .. message.seen
  local entry = ids[1] .. ',' .. ids[2] .. ',' .. (routed and '1' or '0')
  local before = redis.call('GET', P .. key)
  for old in string.gmatch(before or '', '[^;]+') do
    local phone, lid = string.match(old, '^([^,]*),([^,]*),')
    if phone == ids[1] and lid == ids[2] then return end
  end
  setex(key, SEEN_SECONDS, before and before .. ';' .. entry or entry)
end

local function keep_held(user, message, body, most)
  if redis.call('LLEN', P .. 'held:' .. user) >= most then return end
  rpush('held:' .. user, cjson.encode({
    sent = message.sent, event_time = message.event_time, arrived = message.arrived,
    key = message.key, message_id = message.message_id or '', headers = message.headers,
    body = body,
  }))
  hset('held_key', message.key, user)
  zadd('held_until', message.arrived, user)
end

local function forget_held(user, entry)
  hdel('held_key', entry.key)
end

function take_held(user)
  local found = {}
  for _, line in ipairs(lrange('held:' .. user)) do
    local entry = cjson.decode(line)
    forget_held(user, entry)
    if tonumber(entry.arrived) > NOW - HOLD_SECONDS then table.insert(found, entry) end
  end
  del_list('held:' .. user)
  zrem('held_until', user)
  return found
end

-- The message with that key is delivered after all.
local function drop_held(key)
  local user = hget('held_key', key)
  if not user then return end
  local all = lrange('held:' .. user)
  del_list('held:' .. user)
  for _, line in ipairs(all) do
    if cjson.decode(line).key ~= key then rpush('held:' .. user, line) end
  end
  hdel('held_key', key)
end

function rename_held(old, new)
  local all = lrange('held:' .. old)
  if #all == 0 then return end
  local joined = {}
  for _, user in ipairs({old, new}) do
    for _, line in ipairs(lrange('held:' .. user)) do table.insert(joined, cjson.decode(line)) end
  end
  table.sort(joined, function(a, b) return tonumber(a.arrived) < tonumber(b.arrived) end)
  del_list('held:' .. old)
  del_list('held:' .. new)
  for _, entry in ipairs(joined) do
    rpush('held:' .. new, cjson.encode(entry))
    hset('held_key', entry.key, new)
    zadd('held_until', entry.arrived, new)
  end
  zrem('held_until', old)
end

local function release_held(user, alias, tenant, sent_after)
  local released = 0
  for _, held in ipairs(take_held(user)) do
    if not earlier(held.sent, sent_after) then
      add_delivery(held, tenant, user, alias)
      released = released + 1
    end
  end
  return released
end

-- unreadable: ids of messages that went to nobody.  u:<id>: one.  unreadable_of:<user>: theirs.
-- unreadable_key: key of the event -> id.

local UNREADABLE = {'key', 'arrived', 'session', 'event', 'reason', 'user', 'message_id'}

local function delete_unreadable(id)
  local key, user = hget('u:' .. id, 'key'), hget('u:' .. id, 'user')
  if not user then return 0 end
  zrem('unreadable', id)
  hdel('unreadable_key', key)
  if user ~= '' then zrem('unreadable_of:' .. user, id) end
  del_hash('u:' .. id)
  return 1
end

local function keep_unreadable(row, body)
  if row.key and row.key ~= '' and hget('unreadable_key', row.key) then return end
  local id = count('numbers', 'unreadable_id', 1)
  for _, field in ipairs(UNREADABLE) do hset('u:' .. id, field, row[field] or '') end
  hset('u:' .. id, 'body', body)
  zadd('unreadable', id, id)
  if row.key and row.key ~= '' then hset('unreadable_key', row.key, id) end
  if row.user and row.user ~= '' then zadd('unreadable_of:' .. row.user, id, id) end
end

function ops.keep_unreadable(args, body)
  keep_unreadable(args.row, body)
  return {}
end

function ops.unreadable(args)
  local answer = {}
  for _, id in ipairs(redis.call('ZREVRANGEBYSCORE', P .. 'unreadable',
                                 args.before and '(' .. args.before or '+inf', '-inf',
                                 'LIMIT', 0, args.limit)) do
    table.insert(answer, {id, unpack(redis.call('HMGET', P .. 'u:' .. id, 'arrived', 'session',
                                                'event', 'reason', 'user', 'message_id', 'body'))})
  end
  return answer
end

-- Without what came just now and may be decrypted in a moment.
function count_unreadable(args)
  local total, soon = redis.call('ZCARD', P .. 'unreadable'), 0
  for _, id in ipairs(redis.call('ZREVRANGE', P .. 'unreadable', 0, 99)) do
    local facts = redis.call('HMGET', P .. 'u:' .. id, 'arrived', 'reason')
    if tonumber(facts[1]) <= NOW - args.wait then break end
    if facts[2] == args.comes_later then soon = soon + 1 end
  end
  return total - soon
end

-- What is too old or too much goes, and what has come after all.
local function sweep_unreadable(args)
  local ids, bytes = redis.call('ZREVRANGE', P .. 'unreadable', 0, -1), 0
  for place, id in ipairs(ids) do
    local key = 'u:' .. id
    bytes = bytes + redis.call('HSTRLEN', P .. key, 'body')
    local gone = place > args.most or bytes > args.most_bytes
    if not gone and (place > #ids - args.chunk or place <= args.chunk) then
      local facts = redis.call('HMGET', P .. key, 'arrived', 'reason', 'key')
      gone = tonumber(facts[1]) <= NOW - args.seconds
        or facts[2] == args.comes_later and facts[3] ~= ''
          and redis.call('EXISTS', P .. 'seen:' .. facts[3]) == 1
    end
    if gone then delete_unreadable(id) end
  end
end

local function keep_help(user, args)
  local found = hget('help', user)
  if found then
    local queued, sent = string.match(found, '^(%S+) (%S+)$')
    local at, span = queued, args.help_seconds
    if sent ~= '-' then at, span = sent, args.help_cooldown end
    if math.abs(NOW - tonumber(at)) < tonumber(span) then return false end
  end
  hset('help', user, text(NOW) .. ' -')
  zadd('help_waits', text(NOW), user)
  return true
end

function rename_help(old, new)
  local mine, theirs = hget('help', old), hget('help', new)
  if not mine then return end
  local winner = mine
  if theirs then
    local q1, s1 = string.match(mine, '^(%S+) (%S+)$')
    local q2, s2 = string.match(theirs, '^(%S+) (%S+)$')
    local a, b = tonumber(s1) or 0, tonumber(s2) or 0
    if b > a or b == a and tonumber(q2) > tonumber(q1) then winner = theirs end
  end
  hdel('help', old)
  zrem('help_waits', old)
  hset('help', new, winner)
  local queued, sent = string.match(winner, '^(%S+) (%S+)$')
  if sent == '-' then zadd('help_waits', queued, new) else zrem('help_waits', new) end
end

local function full(args, tenant)
  local all = tonumber(kget('waiting', '') or 0)
  if all >= args.max_backlog then return 'all ' .. all end
  local theirs = tonumber(kget('waiting', tenant) or 0)
  if theirs >= args.max_backlog_per_tenant then return 'tenant ' .. theirs end
end

local function accept(args, body)
  local message = args.message
  local user, alias = person(message)
  local ids, found = nil, 'nothing'
  if is_lid(user) then ids = {'', hashed(user)} else ids = {hashed(user), hashed(alias)} end
  if message.seen then
    found = find_seen(message, ids)
    if found == 'itself' then return {'duplicate', user} end
    if found == 'anothers' then -- it needs a key of its own
      message.key = string.sub(redis.sha1hex(message.key .. '|' .. user), 1, 32)
    end
  end
  local tenant, changed = hget('lock', user), last_change(user)
  local taken_on = {user, tenant or '', changed[1], changed[2]}
  for place = 1, 4 do
    if not args.taken_on or args.taken_on[place] ~= taken_on[place] then
      return {'decide', unpack(taken_on)}
    end
  end
  local to = args.decision.tenant
  if to and args.decision.delivers then
    local why = full(args, to)
    if why then return {'full', why} end
  end
  if tonumber(message.sent[1]) > tonumber(kget('numbers', 'sent') or 0)
    and tonumber(message.sent[1]) < math.floor(tonumber(message.arrived)) then
    kset('numbers', 'sent', message.sent[1]) -- WhatsApp's time, and no message's arrival
  end
  if args.decision.kind then
    local binds = args.decision.binds
    if binds then set_lock(user, to) end
    record(message.arrived, user, args.decision.kind, tenant, args.decision.named,
           (binds or args.decision.kind == 'confirmed') and message.sent or nil, message.message_id)
  end
  local released = 0
  if args.decision.delivers then
    if found == 'nobodys' then drop_held(message.key) end
    message.body = body
    add_delivery(message, to, user, alias)
    if not kget('first_seen', to) then kset('first_seen', to, text(NOW)) end
    kset('last_seen', to, text(NOW))
  elseif args.decision.hold and HOLD_SECONDS > 0 then
    keep_held(user, message, body, args.max_held_per_user)
  end
  if args.decision.binds then released = release_held(user, alias, to, message.sent) end
  local helps = args.decision.help and keep_help(user, args)
  -- Last: if an operation fails half-way its copy must not count as seen.
  if message.seen then add_seen(message, ids, args.decision.delivers) end
  return {'accepted', user, helps and '1' or '0', tostring(released)}
end

function ops.are_known(args)
  local answer = {}
  for place, message in ipairs(args.messages) do
    local phone, lid = message.phone, message.lid
    if lid and not phone then phone = phone_of(lid) elseif phone and not lid then lid = lid_of(phone) end
    local known = message.seen and find_seen(message, {hashed(phone) or '', hashed(lid) or ''})
    answer[place] = known == 'itself' and 1 or 0
  end
  return answer
end

function ops.accept(args, body) return accept(args, body) end

-- What accept() would do; then all of it is taken back.
function ops.rehearse(args, body)
  place_all()
  undo = {}
  local answer = accept(args, body)
  take_back()
  to_place = {}
  return answer
end

function ops.held_lids(args)
  local found = {}
  for _, user in ipairs(redis.call('ZREVRANGE', P .. 'held_until', 0, -1)) do
    if is_lid(user) and #found < args.most then table.insert(found, user) end
  end
  return found
end

function ops.sweep(args)
  local gone = 0
  for _, user in ipairs(redis.call('ZRANGEBYSCORE', P .. 'held_until', '-inf',
                                   text(NOW - HOLD_SECONDS), 'LIMIT', 0, args.chunk)) do
    gone = gone + redis.call('LLEN', P .. 'held:' .. user)
    take_held(user)
  end
  for _, user in ipairs(redis.call('ZRANGEBYSCORE', P .. 'help_waits', '-inf',
                                   text(NOW - args.help_seconds), 'LIMIT', 0, args.chunk)) do
    redis.call('ZREM', P .. 'help_waits', user)
    redis.call('HDEL', P .. 'help', user)
  end
  sweep_unreadable(args.unreadable)
  return {gone}
end

function ops.help_waits(args)
  return redis.call('ZRANGEBYSCORE', P .. 'help_waits', '(' .. text(NOW - args.help_seconds), '+inf',
                    'WITHSCORES')
end

function ops.begin_help(args)
  local user = known_as(args.user)
  if hget('lock', user) then
    hdel('help', user)
    zrem('help_waits', user)
    return {}
  end
  local queued = zscore('help_waits', user)
  if not queued or tonumber(queued) <= NOW - args.help_seconds then return {} end
  zrem('help_waits', user)
  hset('help', user, queued .. ' ' .. text(NOW))
  return {user}
end

function ops.undo_help(args)
  local user = args.user
  -- Known by another id since: its row may be of a message that was sent.
  if known_as(user) ~= user then return {} end
  local found = hget('help', user)
  if args.retry and found then
    local queued = string.match(found, '^(%S+)')
    hset('help', user, queued .. ' -')
    zadd('help_waits', queued, user)
  elseif not args.retry then
    hdel('help', user)
    zrem('help_waits', user)
  end
  return {}
end
