-- Dead letters.  x:<id>: one.  dead_letters: all ids.  dead_letters_of:<user>,
-- dead_letters_to:<tenant>: theirs.  dead: tenant -> how many.

local function index_dead_letter(id, tenant, user)
  zadd('dead_letters', id, id)
  zadd('dead_letters_of:' .. user, id, id)
  zadd('dead_letters_to:' .. tenant, id, id)
  count('dead', tenant, 1)
end

local function unindex_dead_letter(id, tenant, user)
  zrem('dead_letters', id)
  zrem('dead_letters_of:' .. user, id)
  zrem('dead_letters_to:' .. tenant, id)
  count('dead', tenant, -1)
end

function add_dead_letter(fields)
  local id, flat = new_id(), {}
  for field, value in pairs(fields) do
    table.insert(flat, field)
    table.insert(flat, value)
  end
  redis.call('HSET', P .. 'x:' .. id, unpack(flat))
  index_dead_letter(id, fields.tenant, fields.user)
end

-- attempts: how many more it had. why: died_at, reason, status, answer.
function give_up(id, tenant, user, attempts, why)
  local from, to = P .. 'd:' .. id, P .. 'x:' .. id
  redis.call('RENAME', from, to)
  redis.call('HINCRBY', to, 'attempts', attempts)
  redis.call('HSET', to, 'died_at', why.died_at, 'reason', why.reason, 'status', why.status or '',
             'answer', why.answer or '')
  redis.call('HDEL', to, 'poison_attempts', 'tried_at', 'age')
  index_dead_letter(id, tenant, user)
  dequeue(id, tenant, user)
end

local function owners_of(id)
  local found = redis.call('HMGET', P .. 'x:' .. id, 'tenant', 'user')
  return found[1], found[2]
end

function delete_dead_letter(id)
  local tenant, user = owners_of(id)
  if not user then return 0 end
  unindex_dead_letter(id, tenant, user)
  return redis.call('DEL', P .. 'x:' .. id)
end

function rename_dead_letters(old, new, alias)
  for _, id in ipairs(zall('dead_letters_of:' .. old)) do
    redis.call('HSET', P .. 'x:' .. id, 'user', new, 'alias', alias)
    zrem('dead_letters_of:' .. old, id)
    zadd('dead_letters_of:' .. new, id, id)
  end
end

function replay(id)
  local tenant, user = owners_of(id)
  if not user then return 0 end
  unindex_dead_letter(id, tenant, user)
  local new = new_id()
  local key = P .. 'd:' .. new
  redis.call('RENAME', P .. 'x:' .. id, key)
  redis.call('HDEL', key, 'died_at', 'reason', 'status', 'answer')
  redis.call('HSET', key, 'event_time', text(NOW), 'poison_attempts', '0', 'tried_at', '', 'age', '0')
  enqueue(new, tenant, user, text(NOW), text(NOW))
  return 1
end
