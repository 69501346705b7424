"""requirements-dev.txt is what `make requirements` wrote for the pyproject.toml of today."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

_ROOT = Path(__file__).parents[2]
_PINNED = re.compile(r"^([A-Za-z0-9._-]+)(?:\[.*\])?==([^ ;\\]+)", re.MULTILINE)


def test_every_dependency_is_pinned_to_a_version_that_pyproject_allows() -> None:
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text())
    lists = [
        project["project"]["dependencies"],
        *project["project"]["optional-dependencies"].values(),
        project["dependency-groups"]["dev"],
        project["build-system"]["requires"],
    ]
    wanted = [Requirement(line) for one in lists for line in one if not line.startswith("statecast[")]

    pinned = {canonicalize_name(name): version for name, version in _PINNED.findall(_requirements())}

    unmet = [str(one) for one in wanted if not one.specifier.contains(pinned.get(canonicalize_name(one.name), "0"))]
    assert unmet == []


def test_every_pin_has_hashes_and_no_index_is_named() -> None:
    blocks = re.split(r"\n(?=[A-Za-z0-9])", _requirements())

    assert all("--hash=sha256:" in block for block in blocks)
    assert "://" not in _requirements()


def _requirements() -> str:
    return (_ROOT / "requirements-dev.txt").read_text()
