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
    local flying = tonumber(hget('flying', tenant) or 0)
    local served = tonumber(hget('served', tenant) or 0)
    zadd('turn', text(flying * TURN + served), tenant)
  else
    zrem('turn', tenant)
    zadd('next', first[2], tenant)
  end
end

local function first_of(line)
  return redis.call('ZRANGE', P .. 'l:' .. line, 0, 0, 'WITHSCORES')
end

-- After anything about the line has changed. due: from now on; nil: as it was.
local function see_to(tenant, user, due)
  local line = line_of(tenant, user)
  local first = first_of(line)
  if #first == 0 then
    srem('lines:' .. user, tenant)
    hdel('line_due', line)
    zrem('due:' .. tenant, user)
  else
    due = due or hget('line_due', line) or text(NOW)
    hset('line_due', line, due)
    if hget('busy', line) then
      zrem('due:' .. tenant, user)
    else
      zadd('due:' .. tenant, due, user)
    end
  end
  place(tenant)
end

local function count(tenant, by)
  hincr('waiting', tenant, by)
  hincr('waiting', '', by)
end

-- content: event_time, arrived, key, message_id, headers, body
function add_delivery(content, tenant, user, alias)
  local id = incr('id') + tonumber(redis.call('GET', P .. 'base') or 0)
  local key = 'd:' .. pad(id)
  undone_by('DEL', P .. key)
  redis.call('HSET', P .. key, 'tenant', tenant, 'user', user, 'alias', alias or '',
    'event_time', content.event_time, 'arrived', content.arrived, 'key', content.key,
    'message_id', content.message_id or '', 'headers', content.headers, 'attempts', '0',
    'own_faults', '0', 'tried_at', '', 'age', '0', 'body', content.body)
  local line = line_of(tenant, user)
  local new_line = #first_of(line) == 0
  zadd('l:' .. line, content.event_time, pad(id))
  zadd('ids', id, pad(id))
  sadd('lines:' .. user, tenant)
  count(tenant, 1)
  see_to(tenant, user, new_line and content.arrived or nil)
  return pad(id)
end

local function delivery(id)
  local values = redis.call('HMGET', P .. 'd:' .. id, 'tenant', 'user', 'alias', 'key', 'headers',
    'body', 'attempts', 'own_faults', 'tried_at', 'age')
  if not values[1] then return nil end
  table.insert(values, 1, id)
  return values
end

-- Take it out of its line; see_to() is the caller's.
local function delete(id, tenant, user)
  del_hash('d:' .. id)
  zrem('l:' .. line_of(tenant, user), id)
  zrem('ids', id)
  count(tenant, -1)
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

function move_lines(old, new)
  local alias = not is_lid(new) and lid_of(new) or ''
  for _, tenant in ipairs(redis.call('SMEMBERS', P .. 'lines:' .. old)) do
    local from, to = line_of(tenant, old), line_of(tenant, new)
    for _, id in ipairs(redis.call('ZRANGE', P .. 'l:' .. from, 0, -1)) do
      zadd('l:' .. to, zscore('l:' .. from, id), id)
      zrem('l:' .. from, id)
      hset('d:' .. id, 'user', new)
      hset('d:' .. id, 'alias', alias or '')
      local flying = hget('fly', id)
      if flying then
        local lease = string.match(flying, '^(%S+)')
        hset('fly', id, lease .. ' ' .. tenant .. ' ' .. new)
        hincr('busy', from, -1)
        hincr('busy', to, 1)
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
  hincr('busy', line_of(tenant, user), -1)
  hincr('flying', tenant, -1)
  hincr('flying', '', -1)
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
function ops.renew(args)
  redis.call('SET', P .. 'base', args.base)
  if args.lease and redis.call('PEXPIRE', P .. 'lease:' .. args.lease, args.milliseconds) == 1 then
    return {args.lease}
  end
  local lease = args.router .. '-' .. string.format('%d', redis.call('INCR', P .. 'fence'))
  redis.call('SET', P .. 'lease:' .. lease, '1', 'PX', args.milliseconds)
  redis.call('SADD', P .. 'leases', lease)
  free_the_dead()
  return {lease}
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

local function holds_lease(args)
  return redis.call('EXISTS', P .. 'lease:' .. args.lease) == 1
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

local function take(tenant, args)
  local user = redis.call('ZRANGEBYSCORE', P .. 'due:' .. tenant, '-inf', text(NOW), 'LIMIT', 0, 1)[1]
  if not user then
    place(tenant)
    return nil
  end
  local line = line_of(tenant, user)
  local id = first_of(line)[1]
  hset('fly', id, args.lease .. ' ' .. tenant .. ' ' .. user)
  redis.call('SADD', P .. 'claims:' .. args.lease, id)
  hincr('busy', line, 1)
  hincr('flying', tenant, 1)
  hincr('flying', '', 1)
  hset('served', tenant, incr('turns'))
  see_to(tenant, user)
  return delivery(id)
end

function ops.claim(args)
  if not holds_lease(args) then return {'lease'} end
  free_the_dead()
  refresh_turns()
  local may, found = among(args), {}
  local half = args.max_in_flight * math.max(1, redis.call('SCARD', P .. 'leases')) / 2
  if args.probe then
    local best, longest = nil, nil
    for _, tenant in ipairs(redis.call('ZRANGE', P .. 'turn', 0, -1)) do
      local probed = tonumber(hget('probed', tenant) or 0)
      if may(tenant) and (not best or probed < longest) then best, longest = tenant, probed end
    end
    local taken = best and take(best, args)
    if taken then
      hset('probed', best, redis.call('GET', P .. 'turns'))
      found = {taken}
    end
  else
    local from = 0
    while #found < args.limit do
      local next_ = redis.call('ZRANGE', P .. 'turn', from, from, 'WITHSCORES')
      if #next_ == 0 then break end
      local tenant, score = next_[1], tonumber(next_[2])
      if not may(tenant) then
        from = from + 1
      else
        local flying = math.floor(score / TURN)
        if flying >= args.cap and tonumber(hget('flying', '') or 0) >= half then break end
        -- Of those who are equal the one with the oldest head.
        local oldest
        for _, equal in ipairs(redis.call('ZRANGEBYSCORE', P .. 'turn', next_[2], next_[2],
                                          'LIMIT', 0, 100)) do
          local due = redis.call('ZRANGE', P .. 'due:' .. equal, 0, 0, 'WITHSCORES')[2]
          if may(equal) and (not oldest or tonumber(due) < oldest) then
            tenant, oldest = equal, tonumber(due)
          end
        end
        local taken = take(tenant, args)
        if taken then table.insert(found, taken) end
      end
    end
  end
  local soon = redis.call('ZRANGE', P .. 'next', 0, 0, 'WITHSCORES')[2]
  return {'ok', soon and text(math.max(0, tonumber(soon) - NOW)) or '', found}
end

-- letters.lua
local bury

function ops.settle(args, body)
  local id = args.id
  if not holds_lease(args) then return {'lease'} end
  if string.match(hget('fly', id) or '', '^(%S+)') ~= args.lease then return {'not ours'} end
  local tenant, user = release(id)
  local there = redis.call('EXISTS', P .. 'd:' .. id) == 1
  if not there then -- an operator took it away meanwhile: that wins
    see_to(tenant, user)
  elseif args.outcome == 'done' then
    delete(id, tenant, user)
    hincr('delivered', tenant, 1)
    see_to(tenant, user, text(NOW))
  elseif args.outcome == 'put back' then
    if args.tried_at then hset('d:' .. id, 'tried_at', args.tried_at) end
    see_to(tenant, user)
  elseif args.outcome == 'again' then
    hincr('d:' .. id, 'attempts', 1)
    if args.own_fault then hset('d:' .. id, 'own_faults', hget('d:' .. id, 'own_faults') + 1) end
    hset('d:' .. id, 'tried_at', args.tried_at)
    hset('d:' .. id, 'age', args.age)
    see_to(tenant, user, args.due)
  else
    args.answer = body
    bury(id, tenant, user, args, 1)
    see_to(tenant, user, text(NOW))
  end
  return {'ok'}
end

function ops.all_due(args)
  local may = among(args)
  for _, key in ipairs({'turn', 'next'}) do
    for _, tenant in ipairs(redis.call('ZRANGE', P .. key, 0, -1)) do
      if may(tenant) then
        local later = redis.call('ZRANGEBYSCORE', P .. 'due:' .. tenant, '(' .. text(NOW), '+inf',
                                 'LIMIT', 0, args.chunk)
        for _, user in ipairs(later) do see_to(tenant, user, text(NOW)) end
        if #later == tonumber(args.chunk) then return {'more'} end
      end
    end
  end
  return {'all'}
end

function ops.backlog()
  local first = redis.call('ZRANGE', P .. 'ids', 0, 0)[1]
  return {first and hget('d:' .. first, 'arrived') or '', redis.call('HGETALL', P .. 'waiting')}
end
