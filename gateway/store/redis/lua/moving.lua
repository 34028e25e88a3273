-- Migration: rows of the tables in schema.sql, and of "lock", put down in an empty session.
--
-- closed: there while the session is moved, and once it has left.

local bring = {}

function bring.lock(row) set_lock(row.user, row.tenant) end

function bring.alias(row)
  hset('phone', row.lid, row.phone)
  if row.phone ~= row.lid then hset('lid', row.phone, row.lid) end
  hset('sighted', row.lid, row.linked_at)
end

-- Lines of a user come in the order of their ids; one that is there already comes a second time.
function bring.history(row)
  local last = redis.call('LINDEX', P .. 'h:' .. row.user, -1)
  if last and tonumber(cjson.decode(last)[SHOWN.id]) >= tonumber(row.id) then return end
  rpush('h:' .. row.user, cjson.encode({
    row.id, row.at, row.user, row.kind, row.from_tenant, row.to_tenant, row.changed_second,
    row.changed_fraction, row.message_id, row.why,
  }))
  note_change(row.user, row.changed_second, row.changed_fraction, row.kind)
  local other = row.kind == 'merged' and string.match(row.why, '^%a+ ([^ ,]+)')
  if other then
    sadd('named:' .. row.user, other)
    sadd('named:' .. other, row.user)
  end
  local highest = tonumber(kget('numbers', 'history_id') or 0)
  if tonumber(row.id) > highest then kset('numbers', 'history_id', row.id) end
end

function bring.help(row)
  hset('help', row.user, row.queued_at .. ' ' .. (row.sent_at ~= '' and row.sent_at or '-'))
  if row.sent_at == '' then zadd('help_waits', row.queued_at, row.user) end
end

function bring.heard(row) hset('heard', row.session, row.at) end

function bring.held(row, body)
  keep_held(row.user, {row.sent_second, row.sent_fraction}, row, body)
end

function bring.unreadable(row, body) keep_unreadable(row, body) end

function bring.dead_letter(row, body) -- the answer stands before the body
  local length = tonumber(row.answer)
  row.answer, row.body = string.sub(body, 1, length), string.sub(body, length + 1)
  add_letter(new_id(), row)
end

function bring.delivery(row, body)
  row.body = body
  local id = add_delivery(row, row.tenant, row.user, row.alias)
  row.own_faults = row.poison_attempts
  for _, field in ipairs({'attempts', 'own_faults', 'tried_at', 'age'}) do
    hset('d:' .. id, field, row[field])
  end
  if row.due ~= '' then see_to(row.tenant, row.user, row.due) end
end

-- One for each session from which something of the tenant comes.
function bring.tenant(row)
  count('delivered', row.id, tonumber(row.delivered))
  local first, last = kget('first_seen', row.id), kget('last_seen', row.id)
  if row.first_seen ~= '' and not (first and tonumber(first) < tonumber(row.first_seen)) then
    kset('first_seen', row.id, row.first_seen)
  end
  if row.last_seen ~= '' and not (last and tonumber(last) > tonumber(row.last_seen)) then
    kset('last_seen', row.id, row.last_seen)
  end
end

function bring.seen(row) add_seen(row.key, row.phone, row.lid, row.routed == '1') end

function ops.bring(args, body)
  kset('numbers', 'base', args.base)
  for _, row in ipairs(args.rows) do bring[args.table](row, body) end
  return {}
end
