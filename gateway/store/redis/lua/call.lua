-- One call: the store's id, 'known' or '' for whether the caller knows the session to be in that
-- store, and operations as triples of name, arguments as JSON, body. An error is its operation's own.

local store = redis.call('GET', P .. 'store')
if store ~= ARGV[1] and (store or ARGV[2] == 'known') then return redis.error_reply(ANOTHER_STORE) end
if redis.call('EXISTS', P .. 'closed') == 1 then
  return redis.error_reply('what was here has been migrated, or is being migrated')
end
local answers = {}
for place = 3, #ARGV, 3 do
  local well, answer = pcall(ops[ARGV[place]], cjson.decode(ARGV[place + 1]), ARGV[place + 2])
  if not well then
    for back = #undo, 1, -1 do cached[undo[back][1]][undo[back][2]] = undo[back][3] end
    answer = redis.error_reply(type(answer) == 'table' and answer.err or tostring(answer))
  end
  answers[#answers + 1], undo = answer, {}
end
place_all()
write_cached()
return answers
