import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_quickstart_runs_and_prints_what_it_promises() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "quickstart.py"], capture_output=True, text=True, timeout=60, check=True
    )

    assert sorted(done.stdout.splitlines()) == [
        "OrderChanged {'total': 300}",
        "OrderPlaced {'orderId': 1}",
        "refused: 'order-1' does not have etag 'stale' (any more)",
    ]


@pytest.mark.parametrize("example", ["quickstart.py", "tests/conftest.py", "tests/test_orders.py"])
def test_the_readme_shows_the_example_as_it_is(example: str) -> None:
    readme = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)

    assert (ROOT / "examples" / example).read_text() in blocks


def test_the_example_of_a_test_on_real_servers_passes(postgresql_url: str, redis_url: str) -> None:
    given = {"STATECAST_TEST_POSTGRESQL_URL": postgresql_url, "STATECAST_TEST_REDIS_URL": redis_url}

    done = subprocess.run(
        [sys.executable, "-m", "pytest", ROOT / "examples" / "tests"],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | given,
    )

    assert "1 passed" in done.stdout, done.stdout
    assert "given by STATECAST_TEST_POSTGRESQL_URL" in done.stdout
    assert done.returncode == 0
