"""Runs of messages as the server's script takes them, and what it says about each. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

import msgpack  # type: ignore[import-untyped]  # has no stubs
import orjson

from statecast.components.broker.broker import Message, Outcome, Published, Refused, Unknown, Unreachable
from statecast.components.redis.connection import ErrorReply, NotSent, Reply, Unanswered
from statecast.components.redis.pipeline import Script

_LONGEST_RUN: Final = 500
_LARGEST_RUN_BYTES: Final = 512 * 1024  # a server can be told to take no more than 1 MiB in one command

LARGEST_MESSAGE_BYTES: Final = 500 * 1024 * 1024
"""What goes into one command of a Redis server (proto-max-bulk-len is 512 MiB) with room for what is around it."""

_TOO_LARGE: Final = ("invalid bulk length", "Elements are too large to be stored")
"""What a server says of a message that it will never take."""

PUBLISH: Final = Script("""
-- KEYS: topics; ARGV[1]: {'' | 'MAXLEN' | 'MINID', entries or milliseconds to keep, messages}
--   message: {topic, key or false, data, metadata or false}
-- returns {{index, error}, ...} of what was not added; the error is '' behind one of the same topic and key
local run = cmsgpack.unpack(ARGV[1])
local trim, keep, messages = run[1], run[2], run[3]
if trim == 'MINID' then
  local time = redis.call('TIME')
  keep = string.format('%d', time[1] * 1000 + math.floor(time[2] / 1000) - keep)
end
local stopped, failed = {}, {}
for i = 1, #messages do
  local message = messages[i]
  local lane = message[2] and message[1] .. ' ' .. message[2]
  if lane and stopped[lane] then
    failed[#failed + 1] = {i, ''}
  else
    local command = {'XADD', KEYS[message[1]]}
    if trim ~= '' then
      command[3], command[4], command[5] = trim, '~', keep
    end
    local n = #command
    command[n + 1], command[n + 2], command[n + 3] = '*', 'data', message[3]
    if message[4] then command[n + 4], command[n + 5] = 'metadata', message[4] end
    local reply = redis.pcall(unpack(command))
    if type(reply) == 'table' and reply.err then
      -- A replica takes nothing of the run. The connection is to see that, so it is the answer of the script.
      if string.find(reply.err, 'READONLY') or string.find(reply.err, 'MASTERDOWN') then return reply end
      failed[#failed + 1] = {i, reply.err}
      if lane then stopped[lane] = true end
    end
  end
end
return failed
""")

# The server's cmsgpack knows no bin type.
_pack = msgpack.Packer(use_bin_type=False, unicode_errors="surrogatepass").pack


@dataclass(frozen=True, slots=True)
class Trim:
    """What an XADD throws away: `MAXLEN ~ 1000` entries, or `MINID ~` what is older than so many milliseconds."""

    strategy: str = ""
    keep: str = ""

    @classmethod
    def to_length(cls, entries: int) -> "Trim":
        return cls("MAXLEN", str(entries))

    @classmethod
    def to_age(cls, age: timedelta) -> "Trim":
        return cls("MINID", str(age // timedelta(milliseconds=1) + 1))


def runs_of(messages: Sequence[Message]) -> Iterator[Sequence[Message]]:
    """Cut messages into runs that the server is through with quickly: nobody else is served meanwhile."""
    start = size = 0
    for index, message in enumerate(messages):
        size += len(message.body)
        if index > start and (index - start == _LONGEST_RUN or size > _LARGEST_RUN_BYTES):
            yield messages[start:index]
            start, size = index, len(message.body)
    if start < len(messages):
        yield messages[start:]


def encode_run(messages: Sequence[Message], trim: Trim) -> tuple[list[str], bytes]:
    """Bring a run to the script's keys and its argument."""
    topics: dict[str, int] = {}
    rows = [
        (
            topics.setdefault(message.topic, len(topics) + 1),
            False if message.key is None else message.key,
            message.body,
            orjson.dumps(dict(message.metadata)) if message.metadata else False,
        )
        for message in messages
    ]
    packed: bytes = _pack((trim.strategy, trim.keep, rows))
    return list(topics), packed


class Lanes:
    """Which messages of a call may still be sent: none behind one of the same topic and key that was not published,
    and none at all behind one of which nothing is known, since its server is not heard any more."""

    def __init__(self) -> None:
        self._stopped: set[tuple[str, str]] = set()
        self._is_server_heard = True

    def is_open(self, message: Message) -> bool:
        return self._is_server_heard and (message.key is None or (message.topic, message.key) not in self._stopped)

    def note(self, messages: Sequence[Message], outcomes: Sequence[Outcome]) -> None:
        for message, outcome in zip(messages, outcomes, strict=True):
            if isinstance(outcome, Unknown):
                self._is_server_heard = False
            if message.key is not None and not isinstance(outcome, Published):
                self._stopped.add((message.topic, message.key))


def outcomes_of(reply: Reply, count: int) -> list[Outcome]:
    """Read the script's answer: an outcome for each message."""
    outcomes: list[Outcome] = [Published()] * count
    for index, error in reply:
        text = error.decode(errors="replace")
        outcomes[index - 1] = _outcome_of_refusal(ErrorReply(text)) if text else HELD_BACK
    return outcomes


HELD_BACK: Final = Unreachable("held back: an earlier message was not published")


def outcome_of_error(error: NotSent | Unanswered | ErrorReply, *, is_alone: bool) -> Outcome:
    """Tell what the failure of a run means for each of its messages, or for the one that it has."""
    match error:
        case NotSent():
            return Unreachable(str(error))
        case ErrorReply(is_refusal=True) | ErrorReply(is_missing_right=True):
            return _outcome_of_refusal(error)
        case ErrorReply() if is_alone and _is_too_large(error):
            return Refused(str(error))
        case Unanswered() | ErrorReply():
            return Unknown(str(error))


def _outcome_of_refusal(error: ErrorReply) -> Refused | Unreachable:
    """Tell what it means for a message that the server did not do it. Hardly ever is that the message's own fault:
    what is not known to be, nor to be the topic's, passes."""
    if error.is_missing_right or error.code == "WRONGTYPE":
        return Refused(str(error), is_about_topic=True)
    return Refused(str(error)) if _is_too_large(error) else Unreachable(str(error))


def _is_too_large(error: ErrorReply) -> bool:
    return any(words in str(error) for words in _TOO_LARGE)
