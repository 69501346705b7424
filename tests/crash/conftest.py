"""Prints the table of the crash matrix at the end of the run, whatever came of it."""

import pytest

from statecast.testing.crash_points import POINTS
from tests.crash.crash_table import CrashTable

_TABLE = pytest.StashKey[CrashTable]()


@pytest.fixture(scope="session")
def crash_table(request: pytest.FixtureRequest) -> CrashTable:
    return request.config.stash.setdefault(_TABLE, CrashTable())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    table = config.stash.get(_TABLE, None)
    if table is None or not table.pairs:
        return
    terminalreporter.section("crash matrix")
    for line in table.lines(POINTS):
        terminalreporter.line(line)
