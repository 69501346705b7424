"""State and the news of it, committed together."""

from statecast.components.manifest import Component
from statecast.components.state.commit import Check, Concurrency, Consistency, ETag, Item
from statecast.components.state.value import FOREVER, delete, upsert
from statecast.errors import (
    ComponentError,
    CorruptState,
    Duplicate,
    ETagMismatch,
    Fenced,
    InvalidRequest,
    NotSupported,
    OutcomeUnknown,
    PublishFailed,
    StatecastError,
    StoreUnavailable,
)
from statecast.outbox.relay import RelayOptions
from statecast.pubsub.cloudevent import CloudEvent, TraceContext
from statecast.runtime.app import Runtime, RuntimeOptions
from statecast.runtime.state import StateClient, Transaction

__all__ = [
    "FOREVER",
    "Check",
    "CloudEvent",
    "Component",
    "ComponentError",
    "Concurrency",
    "Consistency",
    "CorruptState",
    "Duplicate",
    "ETag",
    "ETagMismatch",
    "Fenced",
    "InvalidRequest",
    "Item",
    "NotSupported",
    "OutcomeUnknown",
    "PublishFailed",
    "RelayOptions",
    "Runtime",
    "RuntimeOptions",
    "StateClient",
    "StatecastError",
    "StoreUnavailable",
    "TraceContext",
    "Transaction",
    "delete",
    "upsert",
]
