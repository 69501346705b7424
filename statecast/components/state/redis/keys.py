"""The names of our own keys, which stand beside the state: `statecast:orders:statestore:outbox:3`.

    outbox                hash     how many slices the log has
    outbox:3              stream   the entries of slice 3 that are not passed: `head` (msgpack) and `body`
    lease:3               hash     who relays slice 3, until when, and up to which id it is passed
    relays                zset     relay -> until when it lives, in milliseconds
    deferred:3            hash     queue -> `attempts due pending oldest reason`; due in milliseconds, or `parked`
    deferred:3:entries    zset     `<queue><id>:<msgpack of head and body>`, by their text
    deferred:3:due        zset     `<topic><due><order key>` of the queues that are not parked, by their text
    mark:<digest>         string   what the commit with this mark was answered
    claim:<type>:<id>     hash     the token of an actor's claim, and how many commits were made under it

A queue is `9:orders||1,3:bus,6:orders,`: order key, pub/sub component and topic, each with its length in bytes before
it. The first of them is the `<order key>` above, the other two are the `<topic>`.
"""

from urllib.parse import quote

from statecast.components.state.commit import Guard, Mark
from statecast.components.state.log import DeferredQueue, Topic


class KeyNames:
    """The keys of one (app id, component); neither name can be made to reach into another one's keys."""

    def __init__(self, app_id: str, component: str) -> None:
        self._prefix = f"statecast:{quote(app_id, safe='')}:{quote(component, safe='')}:"
        self.registry = f"{self._prefix}outbox"
        self.relays = f"{self._prefix}relays"
        self.rehearsal = f"{self._prefix}rehearsal"
        self._mark = f"{self._prefix}mark:"

    def stream(self, slice: int) -> str:
        return f"{self._prefix}outbox:{slice}"

    def lease(self, slice: int) -> str:
        return f"{self._prefix}lease:{slice}"

    def deferred(self, slice: int) -> str:
        return f"{self._prefix}deferred:{slice}"

    def deferred_entries(self, slice: int) -> str:
        return f"{self._prefix}deferred:{slice}:entries"

    def deferred_due(self, slice: int) -> str:
        return f"{self._prefix}deferred:{slice}:due"

    def all_deferred(self, slice: int) -> tuple[str, str, str]:
        """Name the three keys of what is deferred, in the order in which the scripts take them."""
        return self.deferred(slice), self.deferred_entries(slice), self.deferred_due(slice)

    def mark(self, mark: Mark) -> str:
        return self._mark + mark.digest.hex()

    def claim(self, type: str, id: str) -> str:
        return f"{self._prefix}claim:{quote(type, safe='')}:{id}"

    def claim_of(self, guard: Guard) -> str:
        return self.claim(guard.type, guard.id)


def order_key_name(order_key: str) -> bytes:
    return _word(order_key)


def topic_name(topic: Topic) -> bytes:
    return b"".join(map(_word, topic))


def queue_name(queue: DeferredQueue) -> bytes:
    return order_key_name(queue.order_key) + topic_name((queue.pubsub, queue.topic))


def read_queue_name(slice: int, name: bytes) -> DeferredQueue:
    words: list[str] = []
    while name:
        length, _, rest = name.partition(b":")
        words.append(rest[: int(length)].decode())
        name = rest[int(length) + 1 :]
    return DeferredQueue(slice, *words)


def _word(text: str) -> bytes:
    """Write text so that it says itself where it ends: `9:orders||1,`."""
    encoded = text.encode()
    return b"%d:%b," % (len(encoded), encoded)
