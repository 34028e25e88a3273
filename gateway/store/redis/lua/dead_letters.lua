-- Dead letters.  x:<id>: one.  letters: all ids.  letters_of:<user>, letters_to:<tenant>: theirs.

local LETTER = {'tenant', 'user', 'alias', 'event_time', 'arrived', 'key', 'message_id', 'headers',
                'attempts', 'died_at', 'reason', 'status', 'answer', 'body'}

local function add_letter(id, fields)
  for _, field in ipairs(LETTER) do hset('x:' .. id, field, fields[field]) end
  zadd('letters', id, id)
  zadd('letters_of:' .. fields.user, id, id)
  zadd('letters_to:' .. fields.tenant, id, id)
  count('dead', fields.tenant, 1)
end

function give_up(id, tenant, user, args, attempts)
  local key, fields = 'd:' .. id, {}
  for _, field in ipairs({'tenant', 'user', 'alias', 'event_time', 'arrived', 'key', 'message_id',
                          'headers', 'body'}) do
    fields[field] = hget(key, field)
  end
  fields.attempts = string.format('%d', hget(key, 'attempts') + attempts)
  fields.died_at, fields.reason = args.died_at, args.reason
  fields.status, fields.answer = args.status or '', args.answer or ''
  add_letter(id, fields)
  delete(id, tenant, user)
end

local function delete_letter(id)
  local user, tenant = hget('x:' .. id, 'user'), hget('x:' .. id, 'tenant')
  if not user then return false end
  zrem('letters', id)
  zrem('letters_of:' .. user, id)
  zrem('letters_to:' .. tenant, id)
  count('dead', tenant, -1)
  del('x:' .. id)
  return true
end

function rename_letters(old, new, alias)
  for _, id in ipairs(redis.call('ZRANGE', P .. 'letters_of:' .. old, 0, -1)) do
    hset('x:' .. id, 'user', new)
    hset('x:' .. id, 'alias', alias)
    zrem('letters_of:' .. old, id)
    zadd('letters_of:' .. new, id, id)
  end
end

-- Ids that fit all of args.id, tenant and user, from one end, at most limit.
local function selected(args, from, to, backwards, limit)
  if args.id then
    return redis.call('EXISTS', P .. 'x:' .. args.id) == 1 and {args.id} or {}
  end
  local key = 'letters'
  local user = args.user and known_as(args.user)
  if args.tenant then key = 'letters_to:' .. args.tenant end
  if user then key = 'letters_of:' .. user end
  local command = backwards and 'ZREVRANGEBYSCORE' or 'ZRANGEBYSCORE'
  if backwards then from, to = to, from end
  local found, at = {}, 0
  while #found < limit do
    local some = redis.call(command, P .. key, from, to, 'LIMIT', at, limit)
    if #some == 0 then break end
    at = at + #some
    for _, id in ipairs(some) do
      if #found < limit and (not (user and args.tenant)
                             or hget('x:' .. id, 'tenant') == args.tenant) then
        table.insert(found, id)
      end
    end
  end
  return found
end

local function letter(id)
  local values = redis.call('HMGET', P .. 'x:' .. id, 'tenant', 'user', 'message_id', 'key',
    'arrived', 'died_at', 'attempts', 'reason', 'status', 'answer', 'body')
  if not values[1] then return nil end
  table.insert(values, 1, id)
  return values
end

function ops.letters(args)
  local found = {}
  for _, id in ipairs(selected(args, '-inf', args.before and '(' .. args.before or '+inf', true,
                               tonumber(args.limit))) do
    table.insert(found, letter(id))
  end
  return found
end

function ops.letter(args)
  local found = letter(args.id)
  return found and {found} or {}
end

function ops.newest_letter()
  return redis.call('ZREVRANGE', P .. 'letters', 0, 0)
end

function ops.replay(args)
  local ids = selected(args, '-inf', args.up_to, false, tonumber(args.chunk))
  for _, id in ipairs(ids) do
    local values = redis.call('HMGET', P .. 'x:' .. id, 'tenant', 'user', 'alias', 'arrived', 'key',
      'message_id', 'headers', 'attempts', 'body')
    local tenant, user = values[1], values[2]
    local fresh = add_delivery({event_time = text(NOW), arrived = values[4], key = values[5],
      message_id = values[6], headers = values[7], body = values[9]}, tenant, user, values[3])
    hset('d:' .. fresh, 'attempts', values[8])
    if redis.call('ZCARD', P .. 'l:' .. line_of(tenant, user)) == 1 then
      see_to(tenant, user, text(NOW))
    end
    delete_letter(id)
  end
  return {#ids}
end

function ops.delete_dead_letters(args)
  local ids = selected(args, '-inf', args.up_to, false, tonumber(args.chunk))
  for _, id in ipairs(ids) do delete_letter(id) end
  return {#ids}
end
