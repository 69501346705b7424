"""Component manifests: Dapr's YAML (and JSON in it) parsed into `Component` values."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta


@dataclass(frozen=True, slots=True)
class Component:
    """One component, its metadata resolved to text. Metadata is kept out of `repr`: it may hold secrets.

    `secret_fields` are the lower-cased names of the metadata fields whose values must never be shown.
    `origin` says where it was read, for errors: `components/state.yaml, document 2`.
    """

    name: str
    type: str
    version: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict, repr=False)
    scopes: tuple[str, ...] = ()
    secret_fields: frozenset[str] = frozenset()
    ignore_errors: bool = False
    init_timeout: timedelta = timedelta(seconds=5)
    origin: str = ""
