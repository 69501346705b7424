"""Etags look like Dapr's, and nobody draws one twice."""

import subprocess
import sys
from uuid import RFC_4122, UUID

from statecast.components.state.etags import new_etag

_DRAW_IN_PARENT_AND_CHILD = """
import os
from statecast.components.state.etags import new_etag
if child := os.fork():
    os.waitpid(child, 0)
print(new_etag(), flush=True)
"""


def test_an_etag_is_a_random_uuid_in_its_canonical_form() -> None:
    etag = new_etag()

    assert str(UUID(etag)) == etag
    assert (UUID(etag).version, UUID(etag).variant) == (4, RFC_4122)


def test_no_etag_is_drawn_twice() -> None:
    assert len({new_etag() for _ in range(100_000)}) == 100_000


def test_a_process_that_forks_off_draws_others_than_its_parent() -> None:
    output = subprocess.check_output([sys.executable, "-c", _DRAW_IN_PARENT_AND_CHILD], text=True)

    child, parent = (UUID(line) for line in output.split())
    assert child.fields[:5] != parent.fields[:5]
