import re
import subprocess
import sys
from pathlib import Path

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


def test_the_readme_shows_the_quickstart_as_it_is() -> None:
    readme = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)

    assert (ROOT / "examples" / "quickstart.py").read_text() in blocks
