"""Component manifests: Dapr's YAML (and JSON in it) parsed into values. Pure: what is read and resolved comes later.

`Manifest` is a component as it is written: its metadata may still refer to secrets and to the environment.
`Component` is the same with every value resolved, which is what a backend is made from.
"""

import json
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Final, TypeVar

import yaml

from statecast.components.duration import parse_duration
from statecast.errors import ComponentError, InvalidRequest

logger = logging.getLogger(__name__)

API_VERSION: Final = "dapr.io/v1alpha1"
KIND: Final = "Component"
DEFAULT_INIT_TIMEOUT: Final = timedelta(seconds=5)


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
    init_timeout: timedelta = DEFAULT_INIT_TIMEOUT
    origin: str = ""


@dataclass(frozen=True, slots=True)
class Inline:
    """A value that stands in the manifest itself, as text; kept out of `repr`, for it may be a password."""

    text: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class SecretKeyRef:
    """A value that the manifest's secret store has: the sub-key `key` of the secret `name`."""

    name: str
    key: str


@dataclass(frozen=True, slots=True)
class EnvRef:
    """A value that the environment variable `name` has."""

    name: str


Source = Inline | SecretKeyRef | EnvRef


@dataclass(frozen=True, slots=True)
class Manifest:
    """One component as it is written. `type` and `version` are lower-cased; `secret_store` is `""` for none."""

    name: str
    type: str
    version: str = ""
    namespace: str = ""
    metadata: Mapping[str, Source] = field(default_factory=dict, repr=False)
    secret_store: str = ""
    scopes: tuple[str, ...] = ()
    ignore_errors: bool = False
    init_timeout: timedelta = DEFAULT_INIT_TIMEOUT
    origin: str = ""


Declared = TypeVar("Declared", bound=Manifest | Component)


def parse_manifests(text: str, origin: str) -> list[Manifest]:
    """Parse every component in a file's text; documents of another apiVersion or kind are passed over.

    Raises ComponentError at the first document that is not YAML (or JSON), or is a component with a broken field;
    one that has `ignoreErrors: true` is warned about and left out instead.
    """
    manifests = []
    for document in _split(text):
        place = f"{origin}, document {document.number}"
        root = _Members.of(_parse_document(document, place))
        if root is None or (root.get("apiVersion"), root.get("kind")) != (API_VERSION, KIND):
            logger.debug("%s: no %s of %s, passed over", place, KIND, API_VERSION)
            continue
        with leaving_out_broken(ignore_errors=_ignores_errors(root)):
            manifests.append(_parse_component(root, place))
    return manifests


@contextmanager
def leaving_out_broken(*, ignore_errors: bool) -> Iterator[None]:
    """Turn a ComponentError inside into a warning where the component says `ignoreErrors: true`."""
    try:
        yield
    except ComponentError as error:
        if not ignore_errors:
            raise
        logger.warning("a component is left out, as its ignoreErrors asks for: %s", error)


def select(declared: Iterable[Declared], *, app_id: str, namespace: str = "") -> list[Declared]:
    """Keep what is meant for this app: in its scopes, and of its namespace where both sides name one.

    Raises ComponentError when two of what is kept have the same name.
    """
    kept: dict[str, Declared] = {}
    for each in declared:
        if not _is_meant_for(each, app_id, namespace):
            continue
        if (earlier := kept.setdefault(each.name, each)) is not each:
            raise ComponentError(
                f"{describe(each)} ({each.type}) is a duplicate definition: {describe(earlier)} ({earlier.type}) "
                "has that name; a name is given once over all types and files"
            )
    return list(kept.values())


def describe(declared: Manifest | Component) -> str:
    """Say where a component is: `components/a.yaml, document 1: component 'orders'`."""
    return f"{declared.origin}: component {declared.name!r}" if declared.origin else f"component {declared.name!r}"


def check_app_id(app_id: str) -> None:
    """Raise InvalidRequest for what cannot be an app id."""
    # dapr pkg/validation/validation.go ValidateSelfHostedAppID
    if not app_id:
        raise InvalidRequest("the app id is empty: parameter app-id cannot be empty")
    if "." in app_id:
        raise InvalidRequest(f"app id {app_id!r} has a dot: parameter app-id cannot contain dots")


def _is_meant_for(declared: Manifest | Component, app_id: str, namespace: str) -> bool:
    if declared.scopes and app_id not in declared.scopes:
        return False
    own = declared.namespace if isinstance(declared, Manifest) else ""
    return not own or not namespace or own == namespace


# Documents


@dataclass(frozen=True, slots=True)
class _Document:
    number: int
    first_line: int
    text: str = field(repr=False)


_SEPARATOR: Final = re.compile(r"^---(?=[ \t\r\n]|\Z)", re.MULTILINE)
_NO_CONTENT: Final = re.compile(r"(?:[ \t]*(?:[#%].*)?(?:\r?\n|\Z))*")


def _split(text: str) -> Iterator[_Document]:
    """Cut a file at its lines of `---`; what is blank, comment or directive before the first one is no document."""
    starts = [0, *(match.end() for match in _SEPARATOR.finditer(text))]
    ends = [*(match.start() for match in _SEPARATOR.finditer(text)), len(text)]
    if len(starts) > 1 and _NO_CONTENT.fullmatch(text, 0, ends[0]):
        starts, ends = starts[1:], ends[1:]
    for number, (start, end) in enumerate(zip(starts, ends, strict=True), start=1):
        yield _Document(number, text.count("\n", 0, start) + 1, text[start:end])


class _Loader(yaml.SafeLoader):
    """YAML's plain words read as Go's parser reads them: dates and `12:30` stay text, `1e3` is a number."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - the shape that PyYAML looks for
        first: [(tag, words) for tag, words in resolvers if tag.rpartition(":")[2] in {"bool", "null", "merge"}]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


# The number forms of gopkg.in/yaml.v2 resolve.go, which Dapr's files are read with.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"[-+]?(?:0b[01]+|0o?[0-7]+|0x[0-9a-fA-F]+|0|[1-9][0-9_]*)\Z"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?\Z"),
    list("-+.0123456789"),
)


def _construct_text(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str:
    """Give a scalar's text, the pairs of `\\u` escapes in it joined as JSON joins them: PyYAML leaves two halves."""
    text = str(loader.construct_scalar(node))
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


_Loader.add_constructor("tag:yaml.org,2002:str", _construct_text)
# A document of another kind may have tags of its own, as `!Ref`; in a component no field takes what has one.
_TAGGED: Final = object()
_Loader.add_constructor(None, lambda loader, node: _TAGGED)


def _parse_document(document: _Document, place: str) -> object:
    content = _NO_CONTENT.sub("", document.text, count=1)
    if content.lstrip().startswith("{"):
        try:
            # JSON first: YAML does not take its tabs.
            return json.loads(content)
        except (ValueError, RecursionError):
            pass  # a YAML flow mapping begins so too
    try:
        return yaml.load(document.text, Loader=_Loader)
    except yaml.YAMLError as error:
        what = _where_and_what(error, document.first_line)
    except (ValueError, LookupError, AttributeError):  # PyYAML's, for `!!int x`, `!!bool x` and `!!timestamp x`
        what = ": a value is not what its tag says"
    except RecursionError:
        what = ": it is nested too deep"
    # The parser's own error quotes the lines around the fault, which may hold a password: it is not passed on.
    raise ComponentError(f"{place}{what}; YAML or JSON is expected")


# A password that begins with `*` or `!` and has no quotes is read as a name, which the parser's error quotes.
_QUOTED_WORD: Final = re.compile(r"'[\w!-]+'")


def _where_and_what(error: yaml.YAMLError, first_line: int) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        problem = _QUOTED_WORD.sub("'…'", error.problem or "")
        return f", line {first_line + error.problem_mark.line}: {problem}"
    reason = getattr(error, "reason", None)
    return f": {reason}" if reason else ""


# Fields


class _Members(Mapping[str, object]):
    """The members of one mapping; names match in any case. A member that is null is absent."""

    def __init__(self, members: Mapping[object, object]) -> None:
        self._members = {str(name).lower(): value for name, value in members.items() if value is not None}

    @classmethod
    def of(cls, value: object) -> "_Members | None":
        return cls(value) if isinstance(value, Mapping) else None

    def __getitem__(self, name: str) -> object:
        return self._members[name.lower()]

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)


@dataclass(frozen=True, slots=True)
class _Field:
    """One place in a document: what stands there, and how an error names it. Errors never show the value."""

    place: str
    path: str
    value: object = field(repr=False)

    def error(self, expectation: str) -> ComponentError:
        return ComponentError(f"{self.place}: {self.path} {expectation}")

    def member(self, name: str) -> "_Field":
        """Go down one level; a member of what is absent is absent."""
        if self.value is None:
            return _Field(self.place, f"{self.path}.{name}", None)
        members = _Members.of(self.value)
        if members is None:
            raise self.error("must be a mapping")
        return _Field(self.place, f"{self.path}.{name}" if self.path else name, members.get(name))

    def items(self) -> "Iterator[_Field]":
        if self.value is None:
            return
        if isinstance(self.value, str) or not isinstance(self.value, Sequence):
            raise self.error("must be a list")
        for index, value in enumerate(self.value):
            yield _Field(self.place, f"{self.path}[{index}]", value)

    def text(self) -> str:
        if isinstance(self.value, Mapping | list):
            raise self.error("must be text")
        return self.json_text()

    def required_text(self, what: str) -> str:
        text = self.text()
        if not text:
            raise self.error(f"is required: {what}")
        return text

    def json_text(self) -> str:
        """Give text as it is, nothing as `""`, and all else as JSON text: `5`, `true`, `["a","b"]`."""
        if self.value is None or isinstance(self.value, str):
            return self.value or ""
        if isinstance(self.value, float) and math.isfinite(self.value) and self.value.is_integer():
            return str(int(self.value))  # JSON has one kind of number, and Go writes 5.0 as 5
        try:
            return json.dumps(self.value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        except (TypeError, ValueError, RecursionError):
            pass
        raise self.error("must be text, a number, true, false, or a list or mapping of these")


def _parse_component(root: _Members, origin: str) -> Manifest:
    metadata = _Field(origin, "", root).member("metadata")
    name = metadata.member("name").required_text("a name such as statestore")
    if name in {".", ".."} or "/" in name or "%" in name:
        raise metadata.member("name").error(f"must not be '.' or '..' nor contain '/' or '%'; it is {name!r}")
    document = _Field(f"{origin}: component {name!r}", "", root)
    spec = document.member("spec")
    return Manifest(
        name=name,
        type=spec.member("type").required_text("a type such as state.redis").lower(),
        version=spec.member("version").text().lower(),
        namespace=metadata.member("namespace").text(),
        metadata=_parse_items(spec.member("metadata").items()),
        secret_store=document.member("auth").member("secretStore").text(),
        scopes=tuple(scope.required_text("an app id") for scope in document.member("scopes").items()),
        ignore_errors=_parse_flag(spec.member("ignoreErrors")),
        init_timeout=_parse_init_timeout(spec.member("initTimeout")),
        origin=origin,
    )


def _parse_items(items: Iterable[_Field]) -> Mapping[str, Source]:
    metadata: dict[str, Source] = {}
    for item in items:
        name = item.member("name").required_text("the name of a field such as redisHost")
        if name in metadata:
            logger.warning("%s: %s gives %r again: the last one counts", item.place, item.path, name)
        metadata[name] = _parse_source(item)
    return metadata


def _parse_source(item: _Field) -> Source:
    """Read where a value comes from: a secret goes before a value, and a value before the environment."""
    secret = item.member("secretKeyRef")
    if secret.value is not None:
        secret_name = secret.member("name").required_text("the name of a secret")
        return SecretKeyRef(secret_name, secret.member("key").text() or secret_name)
    text = item.member("value").json_text()
    variable = item.member("envRef").text()
    return EnvRef(variable) if variable and not text else Inline(text)


def _parse_flag(flag: _Field) -> bool:
    if flag.value is None or isinstance(flag.value, bool):
        return bool(flag.value)
    raise flag.error("must be true or false")


def _parse_init_timeout(timeout: _Field) -> timedelta:
    text = timeout.text()
    try:
        duration = parse_duration(text, "seconds") if text else DEFAULT_INIT_TIMEOUT
    except ValueError:
        raise timeout.error(f"takes a duration such as 500ms, 20s or 1m; it is {text!r}") from None
    return duration if duration > timedelta() else DEFAULT_INIT_TIMEOUT


def _ignores_errors(root: _Members) -> bool:
    """Read the flag of a component of which anything else may be broken."""
    spec = _Members.of(root.get("spec"))
    return spec is not None and spec.get("ignoreErrors") is True
