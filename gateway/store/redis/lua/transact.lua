-- Transactions that Python composes. A command is a list: a command of Redis with its key, without
-- the prefix, and its arguments; or, in small letters, one of those below, for what needs a number
-- that is given here.

local function run(one)
  if one[1] == 'field_of' then -- that field of several hashes
    local values = {}
    for place = 3, #one do values[place - 2] = hget(one[place], one[2]) or false end
    return values
  end
  one[2] = P .. one[2]
  return redis.call(unpack(one))
end

local changes = {}

function changes.count(one) count(one[2], one[3], tonumber(one[4])) end

function changes.greatest(one) greatest(one[2], one[3], one[4]) end
function changes.least(one) least(one[2], one[3], one[4]) end

-- A list in JSON whose first element is its number: the rest of it is given.
function changes.append(one)
  local _, key, counter, rest = unpack(one)
  local number = string.format('%d', count('numbers', counter, 1))
  redis.call('RPUSH', P .. key, '["' .. number .. '",' .. rest)
end

-- A part of bodies as a field.
function changes.body(one, bodies)
  local _, key, field, from, to = unpack(one)
  hset(key, field, string.sub(bodies, from, to))
end

function changes.add(one, bodies)
  local _, user, alias, tenant, content, from, to = unpack(one)
  add_delivery(content, tenant, user, alias, string.sub(bodies, from, to))
end

-- As add, with a field as its body, which goes.
function changes.add_field(one)
  local _, user, alias, tenant, content, key, field = unpack(one)
  add_delivery(content, tenant, user, alias, hget(key, field) or '')
  hdel(key, field)
end

function changes.rename(one)
  local _, old, new, alias = unpack(one)
  rename_queues(old, new, alias)
  rename_dead_letters(old, new, alias)
end

function changes.drop_waiting(one) return drop_waiting(one[2], one[3]) end
function changes.delete_waiting(one) return delete_waiting(one[2]) end

function changes.add_dead_letter(one, bodies)
  local _, fields, from, middle, to = unpack(one)
  fields.answer = string.sub(bodies, from, middle)
  fields.body = string.sub(bodies, middle + 1, to)
  add_dead_letter(fields)
end

function changes.delete_dead_letter(one) return delete_dead_letter(one[2]) end

-- What waits of the user for the tenant is due now.
function changes.due(one) update_queue(one[2], one[3], text(NOW)) end
function changes.replay(one) return replay(one[2]) end
function changes.move_waiting(one) return move_waiting(one[2], one[3]) end

-- The answers to commands that change nothing.
function ops.read(args)
  write_cached()
  local answers = {}
  for place, one in ipairs(args.reads) do answers[place] = run(one) end
  return answers
end

local function full(limits, tenant)
  local all = tonumber(cget('waiting', '') or 0)
  if all >= limits.all then return 'all ' .. all .. ' ' .. tenant end
  local its = tonumber(cget('waiting', tenant) or 0)
  if its >= limits.tenant then return 'tenant ' .. its .. ' ' .. tenant end
end

-- Apply args.changes if each of args.reads is still answered as in args.expected, in JSON; else, or
-- without changes, return the answers. Nothing is added where args.limits are reached.
function ops.transact(args, bodies)
  local answers, same = {}, args.changes ~= nil
  for place, one in ipairs(args.reads or {}) do
    answers[place] = cjson.encode(run(one))
    same = same and answers[place] == args.expected[place]
  end
  if not same then return {'read', answers} end
  for _, one in ipairs(args.limits and args.changes or {}) do
    local why = one[1] == 'add' and full(args.limits, one[4])
    if why then return {'full', why} end
  end
  local results = {}
  for _, one in ipairs(args.changes) do
    local own = changes[one[1]]
    if own then results[#results + 1] = own(one, bodies) else run(one) end
  end
  return {'changed', results}
end

function ops.free(args, bodies) -- the same, for what makes room
  although_full()
  return ops.transact(args, bodies)
end
