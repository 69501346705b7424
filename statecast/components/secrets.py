"""Secret stores, and the resolution of manifests into components: secrets, environment and templates become text.

No secret value appears in a log, an error or a `repr`: messages name secrets, they don't show them.
"""

import difflib
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol
from uuid import UUID, uuid4

from statecast.components.manifest import (
    Component,
    EnvRef,
    Inline,
    Manifest,
    SecretKeyRef,
    Source,
    describe,
    leaving_out_broken,
)
from statecast.components.metadata import MetadataReader, is_secret_name
from statecast.errors import ComponentError

logger = logging.getLogger(__name__)

SECRET_STORE_CATEGORY: Final = "secretstores."
SECRET_STORE_TYPES: Final = ("secretstores.local.env", "secretstores.local.file")
DEFAULT_NAMESPACE: Final = "default"


class SecretStore(Protocol):
    def secret(self, name: str) -> Mapping[str, str] | None:
        """Give the sub-keys of a secret; a secret of one value has one, called as itself. None where there is none."""
        ...

    def names(self) -> Sequence[str]:
        """List the names of the secrets, for a hint in an error; empty where they cannot be listed."""
        ...


class LocalFileSecretStore:
    """`secretstores.local.file`: a JSON file, its tree flattened to `a:b:c`, lists by index (`hosts:0`).

    With `multiValued`, each member of the file is one secret, and what is flattened below it are its sub-keys.
    Numbers and booleans are their JSON text as it stands in the file; null is no secret.
    """

    def __init__(self, component: Component) -> None:
        """Read the file: a relative path starts at the working directory. Raises ComponentError."""
        fields = MetadataReader(component, runtime_fields=())
        path = fields.required_text("secretsFile")
        separator = fields.text("nestedSeparator") or ":"
        is_multi_valued = fields.boolean("multiValued")
        fields.finish()
        try:
            tree = _parse_secrets(Path(path).read_bytes())
        except OSError as error:
            raise fields.error("secretsFile", f"cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise fields.error("secretsFile", f"must be a JSON object: {error}") from None
        self._secrets = _group(tree, separator) if is_multi_valued else _flatten(tree, separator)

    def secret(self, name: str) -> Mapping[str, str] | None:
        return self._secrets.get(name)

    def names(self) -> Sequence[str]:
        return tuple(self._secrets)


class LocalEnvSecretStore:
    """`secretstores.local.env`: the variables of the environment; `prefix` is put before each name.

    Variables of the runtime itself (`APP_API_TOKEN`, `DAPR_*`) are no secrets of an app.
    """

    def __init__(self, component: Component, environment: Mapping[str, str]) -> None:
        fields = MetadataReader(component, runtime_fields=())
        self._prefix = fields.text("prefix", default="") or ""
        fields.finish()
        self._environment = environment

    def secret(self, name: str) -> Mapping[str, str] | None:
        variable = self._prefix + name
        if _is_private(variable) or variable not in self._environment:
            return None
        return {name: self._environment[variable]}

    def names(self) -> Sequence[str]:
        return ()


def resolve(
    declared: Iterable[Manifest | Component],
    app_id: str,
    environment: Mapping[str, str],
    *,
    new_uuid: Callable[[], UUID] = uuid4,
) -> list[Component]:
    """Resolve every value to text and give the components, the secret stores first, else in the order given.

    What is a Component already stays as it is. Secret stores are opened, which reads files. An environment variable
    that is not set leaves its field empty, with a warning. Raises ComponentError for a secret store, a secret or a
    sub-key that is not there, and for a secret reference without `auth.secretStore`; a component with
    `ignoreErrors: true` is left out instead.
    """
    resolver = _Resolver(_Templates(app_id, environment, new_uuid), environment)
    components = []
    for each in sorted(declared, key=lambda each: not is_secret_store(each)):
        with leaving_out_broken(ignore_errors=each.ignore_errors):
            components.append(resolver.resolve(each))
    return components


class _Resolver:
    def __init__(self, templates: "_Templates", environment: Mapping[str, str]) -> None:
        self._templates = templates
        self._environment = environment
        self._stores: dict[str, SecretStore] = {}

    def resolve(self, declared: Manifest | Component) -> Component:
        component = declared if isinstance(declared, Component) else self._resolved(declared)
        if is_secret_store(component):
            self._stores[component.name] = open_secret_store(component, self._environment)
        return component

    def _resolved(self, manifest: Manifest) -> Component:
        return Component(
            name=manifest.name,
            type=manifest.type,
            version=manifest.version,
            metadata={name: self._value(manifest, name, source) for name, source in manifest.metadata.items()},
            scopes=manifest.scopes,
            secret_fields=frozenset(_secret_fields(manifest)),
            ignore_errors=manifest.ignore_errors,
            init_timeout=manifest.init_timeout,
            origin=manifest.origin,
        )

    def _value(self, manifest: Manifest, name: str, source: Source) -> str:
        at = f"{describe(manifest)}: {name}"
        match source:
            case Inline(text):
                value = text
            case EnvRef(variable):
                value = _environment_value(at, variable, self._environment)
            case SecretKeyRef():
                value = _secret_value(at, source, self._store(at, manifest.secret_store))
        if manifest.type.startswith("pubsub.") and "{namespace}" in value:
            # dapr pkg/runtime/meta/meta.go ContainsNamespace
            logger.warning("%s has {namespace}: Dapr puts it before every topic then, which is not supported yet", at)
        # dapr pkg/runtime/meta/meta.go: templates are expanded last, in whatever a value came from
        return self._templates.expand(at, value)

    def _store(self, at: str, name: str) -> SecretStore:
        if not name:
            raise ComponentError(
                f"{at} has a secretKeyRef, but the component names no secret store; "
                "auth.secretStore must be the name of a secretstores component"
            )
        if (store := self._stores.get(name)) is None:
            known = ", ".join(self._stores) or "none"
            raise ComponentError(f"{at} refers to secret store {name!r}, which is not loaded; loaded are: {known}")
        return store


def is_secret_store(declared: Manifest | Component) -> bool:
    return declared.type.lower().startswith(SECRET_STORE_CATEGORY)


def open_secret_store(component: Component, environment: Mapping[str, str]) -> SecretStore:
    """Make the secret store that the component describes. Raises ComponentError."""
    if component.version.lower() not in {"", "v0", "v1"}:
        raise ComponentError(
            f"{describe(component)}: {component.type} has version {component.version!r}: leave it out, or give v1"
        )
    match component.type.lower():
        case "secretstores.local.file":
            return LocalFileSecretStore(component)
        case "secretstores.local.env":
            return LocalEnvSecretStore(component, environment)
    known = ", ".join(SECRET_STORE_TYPES)
    raise ComponentError(f"{describe(component)}: unknown type {component.type!r}; known secret stores are {known}")


def _secret_fields(manifest: Manifest) -> Iterator[str]:
    """A value that does not stand in the manifest is kept secret too: a password is often an environment variable."""
    for name, source in manifest.metadata.items():
        if not isinstance(source, Inline) or is_secret_name(name):
            yield name.lower()


# References


def _secret_value(at: str, reference: SecretKeyRef, store: SecretStore) -> str:
    secret = store.secret(reference.name)
    if secret is None:
        hint = _did_you_mean(reference.name, store.names())
        raise ComponentError(f"{at} refers to secret {reference.name!r}, which its secret store does not have{hint}")
    if reference.key not in secret:
        known = ", ".join(map(repr, secret)) or "none"
        raise ComponentError(
            f"{at} refers to key {reference.key!r} of secret {reference.name!r}, which has no such key; it has: {known}"
        )
    return secret[reference.key]


def _environment_value(at: str, variable: str, environment: Mapping[str, str]) -> str:
    if not _may_be_read(variable, environment):
        logger.warning(
            "%s refers to environment variable %r, which components may not read: it stays empty", at, variable
        )
        return ""
    if variable not in environment:
        logger.warning("%s refers to environment variable %r, which is not set: it stays empty", at, variable)
    return environment.get(variable, "")


def _may_be_read(variable: str, environment: Mapping[str, str]) -> bool:
    # dapr pkg/runtime/processor/secret/secret.go isEnvVarAllowed
    if _is_private(variable) or " " in variable:
        return False
    allowed = environment.get("DAPR_ENV_KEYS", "")
    return not allowed or variable in allowed.split()


def _is_private(variable: str) -> bool:
    return variable.upper() == "APP_API_TOKEN" or variable.upper().startswith("DAPR_")


def _did_you_mean(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1) or [each for each in names if each.startswith(name)][:1]
    return f"; did you mean {close[0]!r}?" if close else ""


# Templates


_TEMPLATE: Final = re.compile(r"\{(uuid|podName|namespace|appID)\}")


@dataclass(frozen=True, slots=True)
class _Templates:
    """`{uuid}`, new at each place; `{podName}`; `{namespace}`, which is `<namespace>.<app id>`; `{appID}`."""

    app_id: str
    environment: Mapping[str, str] = field(repr=False)
    new_uuid: Callable[[], UUID]

    def expand(self, at: str, text: str) -> str:
        return _TEMPLATE.sub(lambda match: self._word(at, match[1]), text)

    def _word(self, at: str, template: str) -> str:
        match template:
            case "uuid":
                return str(self.new_uuid())
            case "podName":
                return self._pod_name(at)
            case "namespace":
                return f"{self.environment.get('NAMESPACE') or DEFAULT_NAMESPACE}.{self.app_id}"
            case _:
                return self.app_id

    def _pod_name(self, at: str) -> str:
        name = self.environment.get("POD_NAME", "")
        if not name:
            raise ComponentError(f"{at} refers to {{podName}}, but the environment variable POD_NAME is not set")
        return name


# The secrets file


def _parse_secrets(data: bytes) -> Mapping[str, object]:
    """Parse the file. Raises ValueError with a reason that shows nothing of it."""
    try:
        # Numbers are kept as they stand: 1.10 as a secret is not 1.1.
        tree = json.loads(data.decode("utf-8-sig"), parse_int=str, parse_float=str, parse_constant=str)
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno}, column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(tree, dict):
        raise ValueError("it is another kind of value")
    return tree


def _flatten(tree: Mapping[str, object], separator: str) -> dict[str, dict[str, str]]:
    return {name: {name: value} for name, value in _leaves(tree, "", separator)}


def _group(tree: Mapping[str, object], separator: str) -> dict[str, dict[str, str]]:
    return {
        name: dict(_leaves(value, "" if isinstance(value, dict | list) else name, separator))
        for name, value in tree.items()
        if value is not None
    }


def _leaves(value: object, path: str, separator: str) -> Iterator[tuple[str, str]]:
    match value:
        case dict():
            for name, member in value.items():
                yield from _leaves(member, f"{path}{separator}{name}" if path else name, separator)
        case list():
            for index, member in enumerate(value):
                yield from _leaves(member, f"{path}{separator}{index}" if path else str(index), separator)
        case bool():
            yield path, "true" if value else "false"
        case str():
            yield path, value
