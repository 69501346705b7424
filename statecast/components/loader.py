"""From component files to components: the rim where files are read."""

import os
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Final

from statecast.components.manifest import (
    Component,
    Manifest,
    check_app_id,
    leaving_out_broken,
    parse_manifests,
    select,
)
from statecast.components.registry import Registry, installed
from statecast.components.secrets import is_secret_store, resolve
from statecast.errors import ComponentError

SUFFIXES: Final = frozenset({".yaml", ".yml", ".json"})

Source = str | PathLike[str] | Component


def load(
    source: Source | Iterable[Source], app_id: str, environment: Mapping[str, str], *, registry: Registry | None = None
) -> list[Component]:
    """Load the components that are meant for `app_id`: from a folder, a file, components made by hand, or several.

    Secret stores come first, else the order is that of the sources, of the file names and of the documents. Scopes,
    NAMESPACE and unique names hold for what is made by hand too; its values are taken as they are. Types and
    versions are checked against `registry` (`registry.installed()` unless given), nothing is imported or connected.

    Reads files, so it blocks. Raises ComponentError, which names file, document, field and what is expected, and
    InvalidRequest for what cannot be an app id.
    """
    check_app_id(app_id)
    registry = installed() if registry is None else registry
    sources = [source] if isinstance(source, str | PathLike | Component) else source
    declared = [each for one in sources for each in _declared_in(one)]
    selected = select(declared, app_id=app_id, namespace=environment.get("NAMESPACE", ""))
    return [each for each in resolve(selected, app_id, environment) if _is_known(each, registry)]


def read_manifests(path: Path) -> list[Manifest]:
    """Read a file, or a folder's .yaml, .yml and .json files by name, not those of its folders.

    Raises ComponentError where the path cannot be read or a component in it is broken.
    """
    try:
        files = _component_files(path) if path.is_dir() else [path]
        return [manifest for file in files for manifest in parse_manifests(_read_text(file), str(file))]
    except OSError as error:
        raise ComponentError(f"cannot read components from {error.filename or path}: {error.strerror}") from error


def _component_files(folder: Path) -> list[Path]:
    files = (file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
    return sorted(files, key=lambda file: file.name)


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ComponentError(f"{file}: not UTF-8 text, at byte {error.start}") from None


def _declared_in(source: Source) -> Iterable[Manifest | Component]:
    if isinstance(source, Component):
        return [source]
    path = os.fspath(source)
    if not path or "\0" in path:
        raise ComponentError(f"components are read from a folder or a file, which {path!r} does not name")
    return read_manifests(Path(path))


def _is_known(component: Component, registry: Registry) -> bool:
    with leaving_out_broken(ignore_errors=component.ignore_errors):
        if not is_secret_store(component):
            registry.check(component)
        return True
    return False
