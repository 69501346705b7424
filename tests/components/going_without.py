"""A test whose program is not there: skipped with the reason, and a failure with CI=true."""

import os
from typing import NoReturn

import pytest

from statecast.runtime.server import ServerMissing


def go_without(missing: ServerMissing) -> NoReturn:
    if os.environ.get("CI") == "true":
        pytest.fail(str(missing), pytrace=False)
    pytest.skip(str(missing))
