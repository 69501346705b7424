"""The members of a group as the server knows them, its consumers: what they are called, and how they are forgotten.

A consumer that is deleted takes what is pending with it into nowhere, so each script looks before it deletes.
"""

import secrets
from typing import Final

from statecast.components.redis.pipeline import Script

PREFIX: Final = "statecast-"
"""What the names of our consumers begin with; those of other programs are left alone."""

HANDED_BACK: Final = PREFIX + "handed-back"
"""The consumer that nobody is: it has what members that left had not settled."""

FORGET: Final = Script("""
-- KEYS: topic; ARGV: group, consumer
local pending = redis.pcall('XPENDING', KEYS[1], ARGV[1], '-', '+', 1, ARGV[2])
if pending.err or #pending > 0 then return 0 end
return redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2])
""")

FORGET_SILENT: Final = Script("""
-- KEYS: topic; ARGV: group, what names begin with, milliseconds of silence
-- One that lives after all has nothing pending either, and is made again by its next read.
local consumers = redis.pcall('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])
for i = 1, #consumers do
  local told, consumer = consumers[i], {}
  for n = 1, #told, 2 do consumer[told[n]] = told[n + 1] end
  local is_ours = string.sub(consumer.name, 1, #ARGV[2]) == ARGV[2]
  if is_ours and consumer.pending == 0 and consumer.idle > tonumber(ARGV[3]) then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], consumer.name)
  end
end
""")


def name_member() -> str:
    return PREFIX + secrets.token_hex(8)
