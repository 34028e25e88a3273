-- Deliveries and user queues. A queue is "tenant:user"; due is a fact of the queue, not of its head.
--
-- numbers: counters; base: where this session's ids begin, for no other session has the same.
-- d:<id>: one delivery.  queue:<queue>: ids in order of event, then arrival.
-- tenants_of:<user>: those of its queues.  ids: all ids.  waiting: tenant -> how many, '' for all.
-- queue_due: queue -> when its head is due.  in_flight: id -> "lease tenant user".
-- busy: queue -> how many in flight.  in_flight_of: tenant -> how many, '' for all.
-- due:<tenant>: users whose head may be claimed from then on: not those in flight.
-- Of each tenant with any: turn (something is due; score is in flight * 2^40 + last served), or next
-- (score is when something will be).

local enqueue, add_delivery, update_queue, new_id, dequeue, drop_waiting, delete_waiting
local rename_queues, move_waiting
-- dead_letters.lua
local add_dead_letter, give_up, delete_dead_letter, rename_dead_letters, replay

local TURN = 1099511627776 -- 2^40

local function queue_of(tenant, user) return tenant .. ':' .. user end

local function place(tenant)
  local first = redis.call('ZRANGE', P .. 'due:' .. tenant, 0, 0, 'WITHSCORES')
  if #first == 0 then
    zrem('turn', tenant)
    zrem('next', tenant)
  elseif tonumber(first[2]) <= NOW then
    zrem('next', tenant)
    local in_flight = tonumber(cget('in_flight_of', tenant) or 0)
    local served = tonumber(cget('served', tenant) or 0)
    zadd('turn', text(in_flight * TURN + served), tenant)
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

local function head_of(queue) return redis.call('ZRANGE', P .. 'queue:' .. queue, 0, 0)[1] end
local function is_empty(queue) return redis.call('EXISTS', P .. 'queue:' .. queue) == 0 end

-- After anything about the queue has changed. due: from now on; nil: as it was.
function update_queue(tenant, user, due)
  local queue = queue_of(tenant, user)
  to_place[tenant] = true
  if is_empty(queue) then
    srem('tenants_of:' .. user, tenant)
    hdel('queue_due', queue)
    zrem('due:' .. tenant, user)
    return
  end
  local before = hget('queue_due', queue)
  due = due or before or text(NOW)
  if due ~= before then hset('queue_due', queue, due) end
  if cget('busy', queue) then zrem('due:' .. tenant, user) else zadd('due:' .. tenant, due, user) end
end

local function count_waiting(tenant, by)
  count('waiting', tenant, by)
  count('waiting', '', by)
end

function new_id()
  local base = tonumber(cget('numbers', 'base') or 0)
  return string.format('%016d', base + count('numbers', 'id', 1))
end

-- due: when the queue is due, if it was empty.
function enqueue(id, tenant, user, event_time, due)
  local queue = queue_of(tenant, user)
  local is_new = is_empty(queue)
  zadd('queue:' .. queue, event_time, id)
  zadd('ids', id, id)
  count_waiting(tenant, 1)
  if is_new then
    sadd('tenants_of:' .. user, tenant)
    hset('queue_due', queue, due)
    -- What is in flight of a queue that is empty has been erased.
    if not cget('busy', queue) then zadd('due:' .. tenant, due, user) end
    to_place[tenant] = true
  end
end

-- content: event_time, arrived, key, message_id, headers; of one that is new accepted: when; of one
-- that was elsewhere before attempts, poison_attempts, tried_at, age, due.
function add_delivery(content, tenant, user, alias, body)
  local id = new_id()
  redis.call('HSET', P .. 'd:' .. id, 'tenant', tenant, 'user', user, 'alias', alias,
    'event_time', content.event_time, 'arrived', content.arrived, 'key', content.key,
    'message_id', content.message_id, 'headers', content.headers,
    'attempts', content.attempts or '0', 'poison_attempts', content.poison_attempts or '0',
    'tried_at', content.tried_at or '', 'age', content.age or '0', 'body', body)
  local due = tonumber(content.arrived) > NOW and text(NOW) or content.arrived
  enqueue(id, tenant, user, content.event_time, due)
  if content.due then update_queue(tenant, user, content.due) end
  if content.accepted then
    least('first_seen', tenant, content.accepted)
    greatest('last_seen', tenant, content.accepted)
  end
end

-- update_queue() is the caller's.
function dequeue(id, tenant, user)
  zrem('queue:' .. queue_of(tenant, user), id)
  zrem('ids', id)
  count_waiting(tenant, -1)
end

local function delete(id, tenant, user)
  redis.call('DEL', P .. 'd:' .. id)
  dequeue(id, tenant, user)
end

local function waiting_of(user)
  local found = {}
  for _, tenant in ipairs(redis.call('SMEMBERS', P .. 'tenants_of:' .. user)) do
    for _, id in ipairs(zall('queue:' .. queue_of(tenant, user))) do
      table.insert(found, {id, tenant})
    end
  end
  return found
end

-- What waits of user and is not in flight is given up on; how many.
function drop_waiting(user, reason)
  local dropped = 0
  for _, one in ipairs(waiting_of(user)) do
    if not hget('in_flight', one[1]) then
      give_up(one[1], one[2], user, 0, {died_at = text(NOW), reason = reason})
      update_queue(one[2], user)
      dropped = dropped + 1
    end
  end
  return dropped
end

function delete_waiting(user)
  local all = waiting_of(user)
  for _, one in ipairs(all) do
    delete(one[1], one[2], user)
    update_queue(one[2], user)
  end
  return #all
end

local function change_queue(id, from, to)
  zadd('queue:' .. to, zscore('queue:' .. from, id), id)
  zrem('queue:' .. from, id)
end

function rename_queues(old, new, alias)
  for _, tenant in ipairs(redis.call('SMEMBERS', P .. 'tenants_of:' .. old)) do
    local from, to = queue_of(tenant, old), queue_of(tenant, new)
    for _, id in ipairs(zall('queue:' .. from)) do
      change_queue(id, from, to)
      redis.call('HSET', P .. 'd:' .. id, 'user', new, 'alias', alias)
      local lease = string.match(hget('in_flight', id) or '', '^(%S+)')
      if lease then
        hset('in_flight', id, lease .. ' ' .. tenant .. ' ' .. new)
        count('busy', from, -1)
        count('busy', to, 1)
      end
    end
    local due, its_due = hget('queue_due', from), hget('queue_due', to)
    if due and (not its_due or tonumber(due) < tonumber(its_due)) then its_due = due end
    sadd('tenants_of:' .. new, tenant)
    update_queue(tenant, old)
    update_queue(tenant, new, its_due)
  end
end

-- What waits for old and was never attempted waits for new; how many.
function move_waiting(old, new)
  local users, moved = {}, 0 -- users with something that waits for old
  for _, user in ipairs(zall('due:' .. old)) do users[user] = true end
  for _, claim in ipairs(redis.call('HVALS', P .. 'in_flight')) do
    local _, tenant, user = string.match(claim, '^(%S+) (%S+) (.+)$')
    if tenant == old then users[user] = true end
  end
  for user in pairs(users) do
    local from, to = queue_of(old, user), queue_of(new, user)
    local due = hget('queue_due', to) or hget('queue_due', from)
    for _, id in ipairs(zall('queue:' .. from)) do
      local tried = redis.call('HMGET', P .. 'd:' .. id, 'attempts', 'tried_at')
      if tried[1] == '0' and tried[2] == '' and not hget('in_flight', id) then
        change_queue(id, from, to)
        hset('d:' .. id, 'tenant', new)
        sadd('tenants_of:' .. user, new)
        moved = moved + 1
      end
    end
    update_queue(old, user)
    update_queue(new, user, due)
  end
  count_waiting(old, -moved)
  count_waiting(new, moved)
  return moved
end

-- Leases. A router's claims end with its lease; what it says of them afterwards is refused.
-- leases: all of them.  lease:<lease>: there while it holds.  claims:<lease>: ids.

local function release(id)
  local lease, tenant, user = string.match(hget('in_flight', id) or '', '^(%S+) (%S+) (.+)$')
  if not lease then return end
  hdel('in_flight', id)
  srem('claims:' .. lease, id)
  count('busy', queue_of(tenant, user), -1)
  count('in_flight_of', tenant, -1)
  count('in_flight_of', '', -1)
  return tenant, user
end

local function free_the_dead()
  for _, lease in ipairs(redis.call('SMEMBERS', P .. 'leases')) do
    if redis.call('EXISTS', P .. 'lease:' .. lease) == 0 then
      for _, id in ipairs(redis.call('SMEMBERS', P .. 'claims:' .. lease)) do
        local tenant, user = release(id)
        if tenant then update_queue(tenant, user) end
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
  cset('numbers', 'base', args.base)
  local latest = tonumber(cget('numbers', 'clock') or 0)
  local back = latest - NOW > args.step and text(latest - NOW) or ''
  if back == '' then cset('numbers', 'clock', text(NOW)) end
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

-- Of whose claim nobody knows: its answer was lost on the way.
function ops.release(args)
  for _, id in ipairs(args.ids) do
    if string.match(hget('in_flight', id) or '', '^(%S+)') == args.lease then
      local tenant, user = release(id)
      update_queue(tenant, user)
    end
  end
  return {}
end

function ops.end_lease(args)
  redis.call('DEL', P .. 'lease:' .. args.lease)
  free_the_dead()
  return {}
end

local function holds_lease(args) return redis.call('EXISTS', P .. 'lease:' .. args.lease) == 1 end

local function filter(args)
  local named = {}
  for _, tenant in ipairs(args.named) do named[tenant] = true end
  return function(tenant) return (named[tenant] or false) ~= args.others end
end

-- A delivery of tenant, and whether another one is due; nil if none is.
local function take(tenant, args)
  local due = redis.call('ZRANGEBYSCORE', P .. 'due:' .. tenant, '-inf', text(NOW), 'LIMIT', 0, 2)
  to_place[tenant] = true
  local user = due[1]
  if not user then return nil end
  local queue = queue_of(tenant, user)
  local id = head_of(queue)
  zrem('due:' .. tenant, user)
  hset('in_flight', id, args.lease .. ' ' .. tenant .. ' ' .. user)
  redis.call('SADD', P .. 'claims:' .. args.lease, id)
  count('busy', queue, 1)
  count('in_flight_of', tenant, 1)
  count('in_flight_of', '', 1)
  cset('served', tenant, string.format('%d', count('numbers', 'turns', 1)))
  return {id, unpack(redis.call('HMGET', P .. 'd:' .. id, 'tenant', 'user', 'alias', 'key', 'headers',
    'body', 'attempts', 'poison_attempts', 'tried_at', 'age', 'event_time'))}, due[2] ~= nil
end

local function longest_unprobed(args, may)
  local best, longest = nil, nil
  local some = args.others and zall('turn') or args.named
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
    return turns(may, -1) -- some never served may come behind
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

local function pick_fairly(args, may)
  local half = args.max_in_flight * math.max(1, redis.call('SCARD', P .. 'leases')) / 2
  -- A tenant that is served has its next turn behind all who were not, and behind those served before:
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
    if one[2] >= args.cap and tonumber(cget('in_flight_of', '') or 0) >= half then break end
    local taken, more = take(one[1], args)
    if taken then table.insert(found, taken) end
    if more then
      table.insert(again, {one[1], one[2] + 1, tonumber(cget('served', one[1]))})
    end
  end
  return found
end

function ops.claim(args)
  if not holds_lease(args) then return {'lease'} end
  although_full()
  free_the_dead()
  place_all()
  for _, tenant in ipairs(redis.call('ZRANGEBYSCORE', P .. 'next', '-inf', text(NOW))) do
    place(tenant)
  end
  local may, found = filter(args), {}
  if args.probe then
    local tenant = longest_unprobed(args, may)
    found = {tenant and take(tenant, args) or nil}
    if found[1] then hset('probed', tenant, cget('numbers', 'turns')) end
  else
    found = pick_fairly(args, may)
  end
  place_all()
  local soon = redis.call('ZRANGE', P .. 'next', 0, 0, 'WITHSCORES')[2]
  return {'ok', soon and text(math.max(0, tonumber(soon) - NOW)) or '', found}
end

function ops.settle(args, body)
  local id = args.id
  if not holds_lease(args) then return {'lease'} end
  although_full()
  if string.match(hget('in_flight', id) or '', '^(%S+)') ~= args.lease then return {'not ours'} end
  local key = hget('d:' .. id, 'key')
  -- Redis came back without its last changes, and has given the id once more.
  if key and key ~= args.key then return {'not ours'} end
  local tenant, user = release(id)
  if not key then -- an operator took it away meanwhile: that wins
    update_queue(tenant, user)
  elseif args.outcome == 'done' then
    delete(id, tenant, user)
    count('delivered', tenant, 1)
    update_queue(tenant, user, text(NOW))
  elseif args.outcome == 'requeue' then
    if args.tried_at then hset('d:' .. id, 'tried_at', args.tried_at) end
    update_queue(tenant, user)
  elseif args.outcome == 'retry' then
    redis.call('HINCRBY', P .. 'd:' .. id, 'attempts', 1)
    redis.call('HINCRBY', P .. 'd:' .. id, 'poison_attempts', args.poison and 1 or 0)
    redis.call('HSET', P .. 'd:' .. id, 'tried_at', args.tried_at, 'age', args.age)
    update_queue(tenant, user, text(NOW + args.wait))
  else
    args.answer = body
    give_up(id, tenant, user, 1, args)
    update_queue(tenant, user, text(NOW))
  end
  return {'ok'}
end
