"""Crash points: places at which a process ends itself by SIGKILL, to see what its successor makes of it.

Nothing of this is in the runtime itself: `arm` wraps methods of the stores and brokers that the process opens from
then on, so that a point which is not armed costs nothing. A point is a deed and a moment of it, `publish.after`:

- `before`: nothing of it has left this process;
- `sent`: what does it has left for the server, or is written in SQLite's transaction, and no answer was looked at. It
  may have been done or not, which is what OutcomeUnknown stands for;
- `after`: it is done, and whoever asked for it has not been told.

In a test of your own, give a child process the point by its environment and let it die, then start a second one
without it, and look at what the two have done together:

    environment = {**os.environ, "STATECAST_CRASH_POINT": "publish.after:3"}      # at the third publish
    child = subprocess.run([sys.executable, "app.py"], env=environment)
    assert child.returncode == -signal.SIGKILL                                    # else the point was not reached

and in the child, before the runtime is opened:

    arm_from_environment()
    async with Runtime.open("components/", app_id="orders") as runtime: ...

What must hold then, whatever the point: a commit that was acknowledged is there; one that was not is there or not,
and repeating it with its idempotency key tells; every event of a commit arrives, no other does, and the first
deliveries of one key are in the order of its commits. Events may arrive twice, with the same id.
"""

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from statecast.components.broker.broker import Broker
from statecast.components.registry import Registry
from statecast.components.state.log import OutboxLog
from statecast.components.state.store import StateStore
from statecast.testing.departures import kill_this_process, last_deed, watch_departures

VARIABLE: Final = "STATECAST_CRASH_POINT"

_Called = Mapping[str, Any]


class Moment(StrEnum):
    BEFORE = "before"
    SENT = "sent"
    AFTER = "after"


@dataclass(frozen=True, slots=True)
class CrashPoint:
    """One point: `name` is what `arm` takes, `description` one line for people."""

    name: str
    description: str


@dataclass(frozen=True, slots=True)
class _Deed:
    """A method of one of the seams, or those calls of it that `is_meant` picks by their arguments."""

    seam: type
    method: str
    what: str
    changes: bool = True
    is_meant: Callable[[_Called], bool] = field(default=lambda called: True)

    @property
    def moments(self) -> tuple[Moment, ...]:
        return tuple(Moment) if self.changes else (Moment.BEFORE, Moment.AFTER)


def _defers(called: _Called) -> bool:
    return bool(called.get("deferrals"))


def _parks(called: _Called) -> bool:
    return any(each.failure is not None and each.failure.pause is None for each in called["progress"])


def _settles(called: _Called) -> bool:
    return any(each.published for each in called["progress"])


_DEEDS: Final[Mapping[str, _Deed]] = {
    "commit": _Deed(StateStore, "transact", "a commit of state, marks and events"),
    "acquire": _Deed(OutboxLog, "acquire", "a relay's leasing of slices"),
    "read": _Deed(OutboxLog, "read", "a relay's reading of the outbox", changes=False),
    "publish": _Deed(Broker, "publish", "a publishing of messages"),
    "advance": _Deed(
        OutboxLog, "advance", "a persisting of what was published", is_meant=lambda called: not _defers(called)
    ),
    "defer": _Deed(OutboxLog, "advance", "a putting aside of refused events", is_meant=_defers),
    "read-deferred": _Deed(OutboxLog, "read_deferred", "a reading of what is aside of a key", changes=False),
    "park": _Deed(OutboxLog, "settle_deferred", "a parking of a key that was refused too often", is_meant=_parks),
    "settle": _Deed(
        OutboxLog,
        "settle_deferred",
        "a removing of what was aside and is published now",
        is_meant=_settles,
    ),
    "replay": _Deed(OutboxLog, "replay", "a replay of parked keys"),
    "trim": _Deed(OutboxLog, "trim", "a giving back of the space of what is published"),
    "release": _Deed(OutboxLog, "release", "a giving back of leases"),
}

_TELLING: Final = {
    Moment.BEFORE: "before {what}: nothing of it has left",
    Moment.SENT: "in the midst of {what}: sent, and not answered",
    Moment.AFTER: "after {what}: done, and nobody was told",
}

POINTS: Final[Mapping[str, CrashPoint]] = {
    name: CrashPoint(name, _TELLING[moment].format(what=deed.what))
    for deed_name, deed in _DEEDS.items()
    for moment in deed.moments
    for name in (f"{deed_name}.{moment}",)
}
"""All points by name, about in the order in which an event comes by them."""


def arm(point: str, passage: int = 1) -> None:
    """Let this process kill itself at its passage number `passage` through `point`, a name of POINTS.

    It holds for the stores and brokers of every `Runtime.open` after it, whatever their types; `sent` only for those
    that come with statecast, and not in memory, where nothing is sent. Calls that send nothing are no passages of a
    `sent` point: on Redis there is nothing to `trim`, for instance, as `advance` does it.

    Raises ValueError for a point that there is not, and a passage below 1.
    """
    if point not in POINTS:
        raise ValueError(f"there is no crash point {point!r}; there are {', '.join(POINTS)}")
    if passage < 1:
        raise ValueError(f"the first passage is 1, not {passage}")
    deed, _, moment = point.partition(".")
    trap = _Trap(_DEEDS[deed], Moment(moment), passage)
    if trap.moment is Moment.SENT:
        watch_departures()
    _watch_makers(trap)


def arm_from_environment(environment: Mapping[str, str] = os.environ) -> str | None:
    """Arm the point that STATECAST_CRASH_POINT names, `publish.after` or `publish.after:3`; return what it says.

    Does nothing and returns None where it is not set. Raises ValueError as `arm`.
    """
    text = environment.get(VARIABLE)
    if not text:
        return None
    point, colon, passage = text.partition(":")
    arm(point, int(passage) if colon else 1)
    return text


@dataclass(slots=True, eq=False)
class _Trap:
    deed: _Deed
    moment: Moment
    passage: int
    passages: int = 0
    watched: set[type] = field(default_factory=set)

    def set_on(self, instance: object) -> None:
        """Watch the deed on the class of this store, log or broker; a class once only."""
        owner = type(instance)
        if owner not in self.watched:
            self.watched.add(owner)
            setattr(owner, self.deed.method, self._trapped(getattr(owner, self.deed.method)))

    def _trapped(self, method: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(method)

        @functools.wraps(method)
        async def watched(*arguments: Any, **options: Any) -> Any:
            if not self.deed.is_meant(signature.bind(*arguments, **options).arguments):
                return await method(*arguments, **options)
            self.passages += 1
            is_due = self.passages >= self.passage
            if is_due and self.moment is Moment.BEFORE:
                kill_this_process()
            if is_due and self.moment is Moment.SENT:
                # Where this passage sends nothing, the next one is due.
                with last_deed():
                    return await method(*arguments, **options)
            result = await method(*arguments, **options)
            if is_due and self.moment is Moment.AFTER:
                kill_this_process()
            return result

        return watched


def _watch_makers(trap: _Trap) -> None:
    """Set the trap on all that a registry makes, which is how a runtime gets its stores and brokers."""
    if trap.deed.seam is Broker:
        _look_at_made("broker", trap.set_on)
    elif trap.deed.seam is StateStore:
        _look_at_made("state_store", trap.set_on)
    else:
        _look_at_made("state_store", lambda store: _watch_log(store, trap))


def _watch_log(store: Any, trap: _Trap) -> None:
    """Set the trap on the store's log, which need not be there before the store is open."""
    owner = type(store)
    if owner in trap.watched:
        return
    trap.watched.add(owner)
    enter = owner.__aenter__

    async def watched(self: Any) -> Any:
        entered = await enter(self)
        trap.set_on(self.log)
        return entered

    owner.__aenter__ = watched


def _look_at_made(name: str, look: Callable[[Any], None]) -> None:
    make = getattr(Registry, name)

    @functools.wraps(make)
    def watched(*arguments: Any, **options: Any) -> Any:
        made = make(*arguments, **options)
        look(made)
        return made

    setattr(Registry, name, watched)
