-- Deliveries and their lines. A line is (tenant, user); due is a fact of the line, not of its first.
--
-- base: where this session's ids begin, for they are not to be another's, too.
-- d:<id>: one delivery.  l:<line>: ids in order of event, then arrival.  lines:<user>: its tenants.
-- ids: all ids.  waiting: tenant -> how many, '' for all.  line_due: line -> when its first is due.
-- fly: id -> "lease tenant user".  busy: line -> how many in flight.  flying: tenant -> how many, ''.
-- due:<tenant>: users whose first may be claimed from then on: not those in flight.
-- Of each tenant with any: turn (something is due; score is in flight * 2^40 + last served), or next
-- (score is when something will be).

local TURN = 1099511627776 -- 2^40

local function line_of(tenant, user) return tenant .. ':' .. user end

local function pad(id) return string.format('%016d', id) end

local function place(tenant)
  local first = redis.call('ZRANGE', P .. 'due:' .. tenant, 0, 0, 'WITHSCORES')
  if #first == 0 then
    zrem('turn', tenant)
    zrem('next', tenant)
  elseif tonumber(first[2]) <= NOW then
    zrem('next', tenant)
    local flying = tonumber(kget('flying', tenant) or 0)
    local served = tonumber(kget('served', tenant) or 0)
    zadd('turn', text(flying * TURN + served), tenant)
  else
    zrem('turn', tenant)
    zadd('next', first[2], tenant)
  end
end

-- Tenants to be placed before anybody looks at turn or next.
local to_place = {}

local function place_all()
  for tenant in pairs(to_place) do place(tenant) end
  to_place = {}
end

local function first_of(line) return redis.call('ZRANGE', P .. 'l:' .. line, 0, 0)[1] end

local function is_empty(line) return redis.call('EXISTS', P .. 'l:' .. line) == 0 end

-- After anything about the line has changed. due: from now on; nil: as it was.
local function see_to(tenant, user, due)
  local line = line_of(tenant, user)
  to_place[tenant] = true
  if is_empty(line) then
    srem('lines:' .. user, tenant)
    hdel('line_due', line)
    zrem('due:' .. tenant, user)
    return
  end
  local before = hget('line_due', line)
  due = due or before or text(NOW)
  if due ~= before then hset('line_due', line, due) end
  if kget('busy', line) then zrem('due:' .. tenant, user) else zadd('due:' .. tenant, due, user) end
end

local function count_waiting(tenant, by)
  count('waiting', tenant, by)
  count('waiting', '', by)
end

local function new_id()
  return pad(count('numbers', 'id', 1) + tonumber(kget('numbers', 'base') or 0))
end

-- content: event_time, arrived, key, message_id, headers, body
function add_delivery(content, tenant, user, alias)
  local id = new_id()
  local key = 'd:' .. id
  redis.call('HSET', P .. key, 'tenant', tenant, 'user', user, 'alias', alias or '',
    'event_time', content.event_time, 'arrived', content.arrived, 'key', content.key,
    'message_id', content.message_id or '', 'headers', content.headers, 'attempts', '0',
    'own_faults', '0', 'tried_at', '', 'age', '0', 'body', content.body)
  local line = line_of(tenant, user)
  local new_line = is_empty(line)
  zadd('l:' .. line, content.event_time, id)
  zadd('ids', id, id)
  count_waiting(tenant, 1)
  if new_line then
    sadd('lines:' .. user, tenant)
    local due = tonumber(content.arrived) > NOW and text(NOW) or content.arrived
    hset('line_due', line, due)
    -- What is in flight of a line that is empty has been erased.
    if not kget('busy', line) then zadd('due:' .. tenant, due, user) end
    to_place[tenant] = true
  end
  return id
end

local function delivery(id)
  local values = redis.call('HMGET', P .. 'd:' .. id, 'tenant', 'user', 'alias', 'key', 'headers',
    'body', 'attempts', 'own_faults', 'tried_at', 'age', 'event_time')
  if not values[1] then return nil end
  table.insert(values, 1, id)
  return values
end

-- Take it out of its line; see_to() is the caller's.
local function delete(id, tenant, user)
  del('d:' .. id)
  zrem('l:' .. line_of(tenant, user), id)
  zrem('ids', id)
  count_waiting(tenant, -1)
end

local function of_user(user)
  local found = {}
  for _, tenant in ipairs(redis.call('SMEMBERS', P .. 'lines:' .. user)) do
    for _, id in ipairs(redis.call('ZRANGE', P .. 'l:' .. line_of(tenant, user), 0, -1)) do
      table.insert(found, {id, tenant})
    end
  end
  return found
end

function move_lines(old, new, alias)
  for _, tenant in ipairs(redis.call('SMEMBERS', P .. 'lines:' .. old)) do
    local from, to = line_of(tenant, old), line_of(tenant, new)
    for _, id in ipairs(redis.call('ZRANGE', P .. 'l:' .. from, 0, -1)) do
      zadd('l:' .. to, zscore('l:' .. from, id), id)
      zrem('l:' .. from, id)
      hset('d:' .. id, 'user', new)
      hset('d:' .. id, 'alias', alias)
      local flying = hget('fly', id)
      if flying then
        local lease = string.match(flying, '^(%S+)')
        hset('fly', id, lease .. ' ' .. tenant .. ' ' .. new)
        count('busy', from, -1)
        count('busy', to, 1)
      end
    end
    local mine, theirs = hget('line_due', from), hget('line_due', to)
    if mine and (not theirs or tonumber(mine) < tonumber(theirs)) then theirs = mine end
    sadd('lines:' .. new, tenant)
    see_to(tenant, old)
    see_to(tenant, new, theirs)
  end
end

-- Leases. A router's claims end with its lease; what it says of them afterwards is refused.
-- leases: all of them.  lease:<lease>: there while it holds.  claims:<lease>: ids.

local function release(id)
  local lease, tenant, user = string.match(hget('fly', id) or '', '^(%S+) (%S+) (.+)$')
  if not lease then return end
  hdel('fly', id)
  srem('claims:' .. lease, id)
  count('busy', line_of(tenant, user), -1)
  count('flying', tenant, -1)
  count('flying', '', -1)
  return tenant, user
end

local function free_the_dead()
  for _, lease in ipairs(redis.call('SMEMBERS', P .. 'leases')) do
    if redis.call('EXISTS', P .. 'lease:' .. lease) == 0 then
      for _, id in ipairs(redis.call('SMEMBERS', P .. 'claims:' .. lease)) do
        local tenant, user = release(id)
        if tenant then see_to(tenant, user) end
      end
      redis.call('DEL', P .. 'claims:' .. lease)
      redis.call('SREM', P .. 'leases', lease)
    end
  end
end

-- args.lease goes on; if it has ended, a new one with the next fencing number begins, and what was
-- claimed under the old one is free.
-- Also what time it is here, and by how many seconds the clock has gone back, '' if it has not.
function ops.renew(args)
  kset('numbers', 'base', args.base)
  local latest = tonumber(kget('numbers', 'clock') or 0)
  local back = latest - NOW > args.step and text(latest - NOW) or ''
  if back == '' then kset('numbers', 'clock', text(NOW)) end
  if args.lease and redis.call('PEXPIRE', P .. 'lease:' .. args.lease, args.milliseconds) == 1 then
    return {args.lease, text(NOW), back}
  end
  although_full()
  local lease = args.router .. '-' .. string.format('%d', redis.call('INCR', P .. 'fence'))
  redis.call('SET', P .. 'lease:' .. lease, '1', 'PX', args.milliseconds)
  redis.call('SADD', P .. 'leases', lease)
  free_the_dead()
  return {lease, text(NOW), back}
end

-- Whether what is written is taken.
function ops.test_write()
  redis.call('SET', P .. 'tested', text(NOW))
  return {}
end

function ops.claimed(args)
  return redis.call('SMEMBERS', P .. 'claims:' .. args.lease)
end

-- Of whose claim nobody knows: its answer was lost on the way.
function ops.release(args)
  for _, id in ipairs(args.ids) do
    if string.match(hget('fly', id) or '', '^(%S+)') == args.lease then
      local tenant, user = release(id)
      see_to(tenant, user)
    end
  end
  return {}
end

function ops.leave(args)
  redis.call('DEL', P .. 'lease:' .. args.lease)
  free_the_dead()
  return {}
end

local holds = {}

local function holds_lease(args)
  if holds[args.lease] == nil then
    holds[args.lease] = redis.call('EXISTS', P .. 'lease:' .. args.lease) == 1
  end
  return holds[args.lease]
end

local function among(args)
  local named = {}
  for _, tenant in ipairs(args.named) do named[tenant] = true end
  return function(tenant) return (named[tenant] or false) ~= args.others end
end

local function refresh_turns()
  for _, tenant in ipairs(redis.call('ZRANGEBYSCORE', P .. 'next', '-inf', text(NOW))) do
    place(tenant)
  end
end

-- A delivery of tenant, and whether another one is due; nil if none is.
local function take(tenant, args)
  local due = redis.call('ZRANGEBYSCORE', P .. 'due:' .. tenant, '-inf', text(NOW), 'LIMIT', 0, 2)
  to_place[tenant] = true
  local user = due[1]
  if not user then return nil end
  local line = line_of(tenant, user)
  local id = first_of(line)
  zrem('due:' .. tenant, user)
  hset('fly', id, args.lease .. ' ' .. tenant .. ' ' .. user)
  redis.call('SADD', P .. 'claims:' .. args.lease, id)
  count('busy', line, 1)
  count('flying', tenant, 1)
  count('flying', '', 1)
  kset('served', tenant, string.format('%d', count('numbers', 'turns', 1)))
  return delivery(id), due[2] ~= nil
end

local function longest_unprobed(args, may)
  local best, longest = nil, nil
  local some = args.others and redis.call('ZRANGE', P .. 'turn', 0, -1) or args.named
  for _, tenant in ipairs(some) do
    if may(tenant) and (args.others or zscore('turn', tenant)) then
      local probed = tonumber(hget('probed', tenant) or 0)
      if not best or probed < longest then best, longest = tenant, probed end
    end
  end
  return best
end

-- Tenants whose turn it is, as {tenant, in flight, last served}, in the order of their turns. Of
-- those never served the one with the oldest head is first.
local turns
function turns(may, most)
  local found, fresh = {}, false
  local flat = redis.call('ZRANGE', P .. 'turn', 0, most, 'WITHSCORES')
  if most > 0 and #flat > 2 * most and tonumber(flat[#flat]) % TURN == 0 then
    return turns(may, -1) -- some never served may stand behind
  end
  for place = 1, #flat, 2 do
    local tenant, score = flat[place], tonumber(flat[place + 1])
    if may(tenant) then
      local one = {tenant, math.floor(score / TURN), score % TURN}
      if one[3] == 0 then
        one.due = tonumber(redis.call('ZRANGE', P .. 'due:' .. tenant, 0, 0, 'WITHSCORES')[2])
        fresh = true
      end
      table.insert(found, one)
    end
  end
  if fresh then
    table.sort(found, function(a, b)
      if a[2] ~= b[2] then return a[2] < b[2] end
      if a[3] ~= b[3] then return a[3] < b[3] end
      return (a.due or 0) < (b.due or 0)
    end)
  end
  return found
end

local function fair_shares(args, may)
  local half = args.max_in_flight * math.max(1, redis.call('SCARD', P .. 'leases')) / 2
  -- Whoever is served has its next turn behind all who were not, and behind those served before:
  -- so both queues stay in order, and the next turn is at the head of one of them.
  local first, again = turns(may, args.others and args.limit + 100 + #args.named or -1), {}
  local at, again_at, found = 1, 1, {}
  while #found < args.limit do
    local one, other = first[at], again[again_at]
    if other and (not one or other[2] < one[2] or other[2] == one[2] and other[3] < one[3]) then
      one, again_at = other, again_at + 1
    else
      at = at + 1
    end
    if not one then break end
    if one[2] >= args.cap and tonumber(kget('flying', '') or 0) >= half then break end
    local taken, more = take(one[1], args)
    if taken then table.insert(found, taken) end
    if more then
      table.insert(again, {one[1], one[2] + 1, tonumber(kget('served', one[1]))})
    end
  end
  return found
end

function ops.claim(args)
  if not holds_lease(args) then return {'lease'} end
  although_full()
  free_the_dead()
  place_all()
  refresh_turns()
  local may, found = among(args), {}
  if args.probe then
    local tenant = longest_unprobed(args, may)
    found = {tenant and take(tenant, args) or nil}
    if found[1] then hset('probed', tenant, kget('numbers', 'turns')) end
  else
    found = fair_shares(args, may)
  end
  place_all()
  local soon = redis.call('ZRANGE', P .. 'next', 0, 0, 'WITHSCORES')[2]
  return {'ok', soon and text(math.max(0, tonumber(soon) - NOW)) or '', found}
end

-- letters.lua
local give_up

function ops.settle(args, body)
  local id = args.id
  if not holds_lease(args) then return {'lease'} end
  although_full()
  if string.match(hget('fly', id) or '', '^(%S+)') ~= args.lease then return {'not ours'} end
  local key = hget('d:' .. id, 'key')
  -- Redis came back without its last changes, and has given the id once more.
  if key and key ~= args.key then return {'not ours'} end
  local tenant, user = release(id)
  if not key then -- an operator took it away meanwhile: that wins
    see_to(tenant, user)
  elseif args.outcome == 'done' then
    delete(id, tenant, user)
    count('delivered', tenant, 1)
    see_to(tenant, user, text(NOW))
  elseif args.outcome == 'requeue' then
    if args.tried_at then hset('d:' .. id, 'tried_at', args.tried_at) end
    see_to(tenant, user)
  elseif args.outcome == 'retry' then
    hset('d:' .. id, 'attempts', hget('d:' .. id, 'attempts') + 1)
    if args.poison then hset('d:' .. id, 'own_faults', hget('d:' .. id, 'own_faults') + 1) end
    hset('d:' .. id, 'tried_at', args.tried_at)
    hset('d:' .. id, 'age', args.age)
    see_to(tenant, user, text(NOW + args.wait))
  else
    args.answer = body
    give_up(id, tenant, user, args, 1)
    see_to(tenant, user, text(NOW))
  end
  return {'ok'}
end

function ops.waiting_tenants()
  write_kept()
  return redis.call('HKEYS', P .. 'waiting')
end

-- Which of what is due later is due now: 'all', 'without_poison' (no attempt counted as poison), or 'ahead' (put off
-- by a clock that has gone back since, which no backoff explains).
local is_due_now = {}

function is_due_now.all() return true end

function is_due_now.without_poison(id) return hget('d:' .. id, 'own_faults') == '0' end

function is_due_now.ahead(id, due, longest)
  local tried_at = tonumber(hget('d:' .. id, 'tried_at'))
  return (tried_at or due) > NOW or due > NOW + longest
end

-- What of args.tenant waits for a backoff is due now, as far as args.which says so. args.passed: how
-- many were passed. How many now, and whether there is more.
function ops.due_now(args)
  although_full()
  local tenant, passed = args.tenant, args.passed
  local later = redis.call('ZRANGEBYSCORE', P .. 'due:' .. tenant, '(' .. text(NOW), '+inf',
                           'WITHSCORES', 'LIMIT', passed, args.chunk)
  for place = 1, #later, 2 do
    local user, due = later[place], tonumber(later[place + 1])
    if is_due_now[args.which](first_of(line_of(tenant, user)), due, args.longest) then
      see_to(tenant, user, text(NOW))
    else
      passed = passed + 1
    end
  end
  return {passed, #later == 2 * tonumber(args.chunk) and 1 or 0}
end

-- The clock has gone back by args.back seconds: changes of locks that lie in the future get their own
-- time back, some of them at a time; none if it is behind what WhatsApp has said, for then it is wrong.
-- How many did, and where to go on, '0' at the end.
function ops.redate(args)
  although_full()
  local latest, redated = NOW + args.tolerance, 0
  if tonumber(kget('numbers', 'sent') or 0) > latest then
    kset('numbers', 'clock', text(NOW))
    return {0, '0'}
  end
  local function own(time)
    return math.min(tonumber(time) - args.back, NOW)
  end
  local page = redis.call('HSCAN', P .. 'change', args.cursor, 'COUNT', args.chunk)
  for place = 1, #page[2], 2 do
    local user, second, fraction, kind = page[2][place], string.match(page[2][place + 1], '^(%S+) (%S+) (%S+)$')
    if tonumber(second) > latest then
      redated = redated + 1
      note_change(user, string.format('%d', math.floor(own(second))), text(own(fraction)), kind)
      for place_back = -1, -redis.call('LLEN', P .. 'h:' .. user), -1 do
        local row = cjson.decode(redis.call('LINDEX', P .. 'h:' .. user, place_back))
        local changed = tonumber(row[SHOWN.second])
        if tonumber(row[SHOWN.at]) <= latest and not (changed and changed > latest) then break end
        row[SHOWN.at] = text(own(row[SHOWN.at]))
        if changed then
          row[SHOWN.second] = string.format('%d', math.floor(own(changed)))
          row[SHOWN.fraction] = text(own(row[SHOWN.fraction]))
        end
        redis.call('LSET', P .. 'h:' .. user, place_back, cjson.encode(row))
      end
    end
  end
  if page[1] == '0' then kset('numbers', 'clock', text(NOW)) end
  return {redated, page[1]}
end

local count_unreadable

function ops.backlog(args)
  write_kept()
  local first = redis.call('ZRANGE', P .. 'ids', 0, 0)[1]
  return {first and hget('d:' .. first, 'arrived') or '', redis.call('HGETALL', P .. 'waiting'),
          redis.call('HLEN', P .. 'held_key'), count_unreadable(args), redis.call('ZCARD', P .. 'letters')}
end
