-- What operators and offices ask and order.

-- What waits of user and is not in flight is given up on; how many.
function drop_waiting(user)
  local dropped = 0
  for _, one in ipairs(of_user(user)) do
    local id, tenant = one[1], one[2]
    if not hget('fly', id) then
      give_up(id, tenant, user, {died_at = text(NOW), reason = "dropped by an operator's unlock"}, 0)
      dropped = dropped + 1
      see_to(tenant, user)
    end
  end
  return dropped
end

-- Up to args.chunk users; what waits when they are the last.
function ops.move(args)
  local old, new, moved = args.old, args.new, 0
  local users = redis.call('ZRANGE', P .. 'of:' .. old, 0, args.chunk - 1)
  for _, user in ipairs(users) do
    local before = last_change(user)
    set_lock(user, new)
    record(text(NOW), user, 'moved', old, new, latest(before, args.at or moment_now()), nil,
           'operator, with all of the tenant')
  end
  if args.with_waiting and #users < args.chunk then
    local there = {} -- users with something that waits for old
    for _, user in ipairs(redis.call('ZRANGE', P .. 'due:' .. old, 0, -1)) do there[user] = true end
    for _, flying in ipairs(redis.call('HVALS', P .. 'fly')) do
      local _, tenant, user = string.match(flying, '^(%S+) (%S+) (.+)$')
      if tenant == old then there[user] = true end
    end
    for user in pairs(there) do
      local from, to = line_of(old, user), line_of(new, user)
      local due, joined = hget('line_due', from), hget('line_due', to)
      for _, id in ipairs(redis.call('ZRANGE', P .. 'l:' .. from, 0, -1)) do
        local values = redis.call('HMGET', P .. 'd:' .. id, 'attempts', 'tried_at')
        if values[1] == '0' and values[2] == '' and not hget('fly', id) then
          zadd('l:' .. to, zscore('l:' .. from, id), id)
          zrem('l:' .. from, id)
          hset('d:' .. id, 'tenant', new)
          sadd('lines:' .. user, new)
          if due and not joined then hset('line_due', to, due) end
          moved = moved + 1
        end
      end
    end
    count_waiting(old, -moved)
    count_waiting(new, moved)
    for user in pairs(there) do
      see_to(old, user)
      see_to(new, user)
    end
  end
  return {#users, moved}
end

-- Up to limit users that come after `after`; of one tenant if it is given.
function ops.users(args)
  local key = args.tenant and 'of:' .. args.tenant or 'users'
  local found = redis.call('ZRANGEBYLEX', P .. key, args.after and '(' .. args.after or '-', '+',
                           'LIMIT', 0, args.limit)
  local answer = {}
  for _, user in ipairs(found) do
    table.insert(answer, user)
    table.insert(answer, hget('lock', user))
  end
  return answer
end

function ops.totals(args)
  write_kept()
  return {redis.call('HLEN', P .. 'lock'), redis.call('HLEN', P .. 'owners'),
          args.names and redis.call('HKEYS', P .. 'owners') or {}, tonumber(kget('waiting', '') or 0)}
end

-- args.of: 'owners', 'delivered', 'waiting', 'dead', 'first_seen' or 'last_seen'.
function ops.tenant_totals(args)
  write_kept()
  return redis.call('HGETALL', P .. args.of)
end

-- How many lines of user's history have ids below `before`: their ids grow.
local function lines_before(user, before)
  local low, high = 0, redis.call('LLEN', P .. 'h:' .. user)
  while before and low < high do
    local middle = math.floor((low + high) / 2)
    local line = cjson.decode(redis.call('LINDEX', P .. 'h:' .. user, middle))
    if tonumber(line[SHOWN.id]) < before then low = middle + 1 else high = middle end
  end
  return before and low or high
end

-- Up to args.limit lines, newest first.
function ops.history(args)
  local found, limit = {}, args.limit
  for _, user in ipairs(ids_of(args.user)) do
    local count = lines_before(user, tonumber(args.before))
    if count > 0 and limit > 0 then
      local some = redis.call('LRANGE', P .. 'h:' .. user, math.max(0, count - limit), count - 1)
      for _, line in ipairs(some) do table.insert(found, cjson.decode(line)) end
    end
  end
  table.sort(found, function(a, b) return tonumber(a[1]) > tonumber(b[1]) end)
  local answer = {}
  for place = 1, math.min(limit, #found) do answer[place] = found[place] end
  return answer
end

-- Up to args.limit messages, all without it; and how many wait, are held, are dead.
function ops.export(args)
  local ids, messages = ids_of(args.user), {}
  local limit, counts = tonumber(args.limit) or math.huge, {0, 0, 0}
  for _, user in ipairs(ids) do
    for _, one in ipairs(of_user(user)) do
      counts[1] = counts[1] + 1
      if #messages < limit then
        local values = redis.call('HMGET', P .. 'd:' .. one[1], 'arrived', 'message_id', 'body')
        table.insert(messages, {'waiting', one[2], unpack(values)})
      end
    end
    for _, line in ipairs(lrange('held:' .. user)) do
      counts[2] = counts[2] + 1
      if #messages < limit then
        local entry = cjson.decode(line)
        table.insert(messages, {'held', '', entry.arrived, entry.message_id, entry.body})
      end
    end
    for _, id in ipairs(redis.call('ZRANGE', P .. 'letters_of:' .. user, 0, -1)) do
      counts[3] = counts[3] + 1
      if #messages < limit then
        local values = redis.call('HMGET', P .. 'x:' .. id, 'tenant', 'arrived', 'message_id', 'body')
        table.insert(messages, {'dead_letter', unpack(values)})
      end
    end
    for _, id in ipairs(redis.call('ZRANGE', P .. 'unreadable_of:' .. user, 0, -1)) do
      if #messages < limit then
        local values = redis.call('HMGET', P .. 'u:' .. id, 'arrived', 'message_id', 'body')
        table.insert(messages, {'unreadable', '', unpack(values)})
      end
    end
  end
  return {ids, hget('lock', ids[1]) or '', messages, counts, hget('help', ids[1]) or ''}
end

function ops.erase(args)
  local ids = ids_of(args.user)
  local n = {locks = 0, waiting = 0, held = 0, letters = 0, aliases = 0, help = 0, unreadable = 0,
             history = 0}
  local lines = {}
  for _, user in ipairs(ids) do
    if hget('lock', user) then
      set_lock(user, nil)
      n.locks = n.locks + 1
    end
    for _, one in ipairs(of_user(user)) do
      delete(one[1], one[2], user)
      see_to(one[2], user)
      n.waiting = n.waiting + 1
    end
    n.held = n.held + #lrange('held:' .. user)
    drop_all_held(user)
    for _, id in ipairs(redis.call('ZRANGE', P .. 'letters_of:' .. user, 0, -1)) do
      delete_letter(id)
      n.letters = n.letters + 1
    end
    for _, id in ipairs(redis.call('ZRANGE', P .. 'unreadable_of:' .. user, 0, -1)) do
      n.unreadable = n.unreadable + delete_unreadable(id)
    end
    n.help = n.help + hdel('help', user)
    zrem('help_waits', user)
    for _, line in ipairs(lrange('h:' .. user)) do table.insert(lines, cjson.decode(line)) end
    redis.call('DEL', P .. 'h:' .. user)
    hdel('change', user)
    if is_lid(user) then
      local phone = hget('phone', user)
      if phone then
        n.aliases = n.aliases + 1
        hdel('phone', user)
        hdel('sighted', user)
        if hget('lid', phone) == user then hdel('lid', phone) end
      end
    else
      hdel('lid', user)
    end
  end
  -- The names come off these entries. Those from when the person had another id
  -- are the person's up to where that turned out to be this one.
  for _, user in ipairs(ids) do
    for _, other in ipairs(redis.call('SMEMBERS', P .. 'named:' .. user)) do
      local entries, until_ = {}, 0
      for place, line in ipairs(lrange('h:' .. other)) do
        entries[place] = cjson.decode(line)
        local why = entries[place][SHOWN.why]
        if why == 'is ' .. user or why == 'is ' .. user .. ', says WAHA' then until_ = place end
      end
      redis.call('DEL', P .. 'h:' .. other)
      hdel('change', other) -- but for those that stay
      for place, row in ipairs(entries) do
        if place <= until_ then
          table.insert(lines, row)
        else
          local why = row[SHOWN.why]
          if string.find(why, ' ' .. user .. ',', 1, true) or string.sub(why, -#user) == user then
            row[SHOWN.why], row[SHOWN.message_id] = '', ''
          end
          redis.call('RPUSH', P .. 'h:' .. other, cjson.encode(row))
          note_change(other, row[SHOWN.second], row[SHOWN.fraction], row[SHOWN.kind])
        end
      end
      redis.call('SREM', P .. 'named:' .. other, user)
    end
    redis.call('DEL', P .. 'named:' .. user)
  end
  n.history = #lines
  local nobody = 'h:erased-' .. string.sub(redis.sha1hex(ids[1] .. text(NOW) .. args.salt), 1, 16)
  for _, row in ipairs(lines) do
    row[SHOWN.user], row[SHOWN.message_id], row[SHOWN.why] = string.sub(nobody, 3), '', ''
    row[SHOWN.second], row[SHOWN.fraction] = '', ''
    rpush(nobody, cjson.encode(row))
  end
  if n.history > 0 then
    record(text(NOW), string.sub(nobody, 3), 'erased', nil, nil, nil, nil, 'operator')
  end
  return {ids, n.locks, n.waiting, n.held, n.letters, n.aliases, n.help, n.unreadable,
          n.history}
end

-- heard: WAHA session -> up to when its messages were accepted. In the home session's keys alone.

function ops.note_heard(args)
  for session, at in pairs(args.times) do
    if tonumber(hget('heard', session) or 0) < tonumber(at) then hset('heard', session, at) end
  end
  return {}
end

function ops.heard() return redis.call('HGETALL', P .. 'heard') end
