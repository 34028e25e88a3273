-- Accepting, and what waits for a link.
--
-- seen:<key>: "phone,lid,routed;…" of each person who had it, ids as hashes, for 48 hours and more.
-- held:<user>: messages, oldest first.  held_until: "user" -> when the newest of them arrived.
-- held_key: idempotency key -> user.  help: user -> "queued sent".  help_waits: user -> queued.

local SEEN_SECONDS = 259200

local function add_seen(digest, phone, lid, routed)
  local key = P .. 'seen:' .. digest
  local entry = phone .. ',' .. lid .. ',' .. (routed and '1' or '0')
  local before = redis.call('GET', key)
  for old in string.gmatch(before or '', '[^;]+') do
    local its_phone, its_lid = string.match(old, '^([^,]*),([^,]*),')
    if its_phone == phone and its_lid == lid then return end
  end
  redis.call('SET', key, before and before .. ';' .. entry or entry, 'EX', SEEN_SECONDS)
end

-- Who holds a message of that key: a copy may have come by phone and by LID.
local function holders(key)
  local found = {}
  for user in string.gmatch(hget('held_key', key) or '', '[^\n]+') do table.insert(found, user) end
  return found
end

local function set_holder(key, user, holds)
  local users = {}
  for _, other in ipairs(holders(key)) do
    if other ~= user then table.insert(users, other) end
  end
  if holds then table.insert(users, user) end
  if #users > 0 then hset('held_key', key, table.concat(users, '\n')) else hdel('held_key', key) end
end

local function keep_held(user, sent, content, body)
  rpush('held:' .. user, cjson.encode({
    sent = sent, event_time = content.event_time, arrived = content.arrived, key = content.key,
    message_id = content.message_id or '', headers = content.headers, body = body,
  }))
  set_holder(content.key, user, true)
  zadd('held_until', content.arrived, user)
end

-- Nothing is held of user any more.
function drop_all_held(user)
  for _, line in ipairs(lrange('held:' .. user)) do
    set_holder(cjson.decode(line).key, user, false)
  end
  del('held:' .. user)
  zrem('held_until', user)
end

-- The message that is held of user under that key, which is held no longer; nil if none is.
local function take_held(user, key)
  local all, found = lrange('held:' .. user), nil
  del('held:' .. user)
  for _, line in ipairs(all) do
    local entry = cjson.decode(line)
    if entry.key == key then found = entry else rpush('held:' .. user, line) end
  end
  if #all < 2 then zrem('held_until', user) end
  set_holder(key, user, false)
  return found
end

function rename_held(old, new)
  local all = lrange('held:' .. old)
  if #all == 0 then return end
  local joined = {}
  for _, user in ipairs({old, new}) do
    for _, line in ipairs(lrange('held:' .. user)) do table.insert(joined, cjson.decode(line)) end
  end
  table.sort(joined, function(a, b) return tonumber(a.arrived) < tonumber(b.arrived) end)
  del('held:' .. old)
  del('held:' .. new)
  for _, entry in ipairs(joined) do
    rpush('held:' .. new, cjson.encode(entry))
    set_holder(entry.key, old, false)
    set_holder(entry.key, new, true)
    zadd('held_until', entry.arrived, new)
  end
  zrem('held_until', old)
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
  del('u:' .. id)
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

local function full(args, tenant)
  local all = tonumber(kget('waiting', '') or 0)
  if all >= args.max_backlog then return 'all ' .. all end
  local theirs = tonumber(kget('waiting', tenant) or 0)
  if theirs >= args.max_backlog_per_tenant then return 'tenant ' .. theirs end
end

-- Of each of ids and of those who are or were the same persons, in order: id, tenant, last change,
-- help, the other id, when that was linked (of a LID), what is held, and, if anything is, the changes
-- of the lock that show where it belongs. As a text: an equal one means that nothing has changed.
local function facts_of(ids)
  local all, is_there = {}, {}
  local function add(id)
    if id and not is_there[id] then
      table.insert(all, id)
      is_there[id] = true
    end
  end
  for _, id in ipairs(ids) do
    add(id)
    if is_lid(id) then add(phone_of(id)) else add(lid_of(id)) end
  end
  table.sort(all)
  local found, oldest = {}, nil
  for place, id in ipairs(all) do
    local held = {}
    for _, line in ipairs(lrange('held:' .. id)) do
      local entry = cjson.decode(line)
      table.insert(held, {entry.key, entry.sent[1], entry.sent[2], entry.arrived})
      if not oldest or earlier(entry.sent, oldest) then oldest = entry.sent end
    end
    local of_a_lid = is_lid(id)
    found[place] = {
      id, hget('lock', id) or '', hget('change', id) or '', hget('help', id) or '',
      of_a_lid and (hget('phone', id) or '') or lid_of(id) or '',
      of_a_lid and hget('sighted', id) or '', #held > 0 and held or '',
    }
  end
  for _, facts in ipairs(found) do facts[8] = oldest and changes_since(facts[1], oldest) or '' end
  return cjson.encode(found)
end

local function seen_of(digest) return digest and redis.call('GET', P .. 'seen:' .. digest) or '' end

function ops.full(args) return {full(args, args.tenant) or ''} end

-- What was decided on that: each change is a list, its name first.
local apply = {}

function apply.set_lock(change) set_lock(change[2], change[3] ~= '' and change[3] or nil) end

function apply.record(change)
  local _, at, user, kind, from, to, second, fraction, message_id, why, other = unpack(change)
  record(at, user, kind, from, to, second ~= '' and {second, fraction} or nil, message_id, why)
  if other ~= '' then -- whose history names whom: an erasure must find it
    sadd('named:' .. user, other)
    sadd('named:' .. other, user)
  end
end

function apply.pair(change)
  local _, lid, phone, at = unpack(change)
  local before = phone_of(lid)
  if before and lid_of(before) == lid then hdel('lid', before) end
  hset('phone', lid, phone ~= '' and phone or lid)
  if phone ~= '' then hset('lid', phone, lid) end
  hset('sighted', lid, at)
end

function apply.rename(change)
  local _, old, new, alias = unpack(change)
  move_lines(old, new, alias)
  rename_letters(old, new, alias)
  rename_held(old, new)
end

function apply.help(change)
  local _, user, queued, sent = unpack(change)
  if queued == '' then
    hdel('help', user)
  else
    hset('help', user, queued .. ' ' .. (sent ~= '' and sent or '-'))
  end
  if queued ~= '' and sent == '' then zadd('help_waits', queued, user) else zrem('help_waits', user) end
end

local function deliver(content, tenant, user, alias)
  add_delivery(content, tenant, user, alias)
  if not kget('first_seen', tenant) then kset('first_seen', tenant, text(NOW)) end
  kset('last_seen', tenant, text(NOW))
end

function apply.add(change, bodies)
  local _, user, alias, tenant, content, from, to = unpack(change)
  content.body = string.sub(bodies, from, to)
  deliver(content, tenant, user, alias)
end

function apply.hold(change, bodies)
  local _, user, sent, content, from, to = unpack(change)
  keep_held(user, sent, content, string.sub(bodies, from, to))
end

function apply.release(change)
  local _, user, key, alias, tenant = unpack(change)
  local held = take_held(user, key)
  if held then deliver(held, tenant, user, alias) end
end

function apply.drop_held(change) drop_all_held(change[2]) end

function apply.forget_held(change)
  for _, user in ipairs(holders(change[2])) do take_held(user, change[2]) end
end

function apply.seen(change) add_seen(change[2], change[3], change[4], change[5] == '1') end

-- Apply args.changes if what is known is still what they were decided on, args.known and args.seen;
-- else say what is known. Without changes: say it. bodies: of what the changes add, in one.
-- args.newest: the time that WhatsApp gave to a message.
function ops.change(args, bodies)
  local known, seen = facts_of(args.ids), seen_of(args.digest)
  if not args.changes or known ~= args.known or seen ~= args.seen then
    return {'known', known, seen}
  end
  for _, change in ipairs(args.changes) do
    local why = change[1] == 'add' and full(args, change[4])
    if why then return {'full', why} end
  end
  if args.newest and tonumber(args.newest) > tonumber(kget('numbers', 'sent') or 0) then
    kset('numbers', 'sent', args.newest)
  end
  for _, change in ipairs(args.changes) do apply[change[1]](change, bodies) end
  return {'changed', args.drop and drop_waiting(args.drop) or 0}
end

-- Of several messages at once: what ops.change() says.
function ops.load(args)
  local answer = {}
  for place, one in ipairs(args.each) do answer[place] = {facts_of(one[1]), seen_of(one[2])} end
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
    drop_all_held(user)
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
