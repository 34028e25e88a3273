-- One call: the store's id, and operations as triples of name, arguments as JSON, body. An error is
-- its operation's own.

if redis.call('GET', P .. 'store') ~= ARGV[1] then return redis.error_reply(ANOTHER_STORE) end
if redis.call('EXISTS', P .. 'closed') == 1 and ARGV[2] ~= 'bring' then
  return redis.error_reply('what was here has moved, or is being moved')
end
local answers = {}
for place = 2, #ARGV, 3 do
  local well, answer = pcall(ops[ARGV[place]], cjson.decode(ARGV[place + 1]), ARGV[place + 2])
  if not well then
    if undo then take_back() end
    answer = redis.error_reply(type(answer) == 'table' and answer.err or tostring(answer))
  end
  answers[#answers + 1] = answer
end
place_all()
write_kept()
return answers
