import sys
from collections.abc import Callable

import pytest

from statecast import OutcomeUnknown, StoreUnavailable
from statecast.runtime import cli

AWAY = StoreUnavailable("the store is away")

FailingDemo = Callable[[Exception], None]


@pytest.fixture
def failing_demo(monkeypatch: pytest.MonkeyPatch) -> FailingDemo:
    """Run `statecast demo` so that it fails in this way."""

    def run(error: Exception) -> None:
        def fail(*arguments: object, **options: object) -> None:
            raise error

        monkeypatch.setattr(cli, "run_demo", fail)
        monkeypatch.setattr(sys, "argv", ["statecast", "demo"])
        cli.main()

    return run


def test_an_error_on_purpose_is_one_line(failing_demo: FailingDemo, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        failing_demo(AWAY)

    assert exit.value.code == 1
    assert capsys.readouterr().err == "statecast: the store is away\n"


def test_a_group_of_errors_is_a_line_for_each_that_differs(
    failing_demo: FailingDemo, capsys: pytest.CaptureFixture[str]
) -> None:
    writers = ExceptionGroup("writers", [AWAY, AWAY, OutcomeUnknown("no answer came")])

    with pytest.raises(SystemExit) as exit:
        failing_demo(ExceptionGroup("demo", [writers]))

    assert exit.value.code == 1
    assert capsys.readouterr().err == "statecast: the store is away\nstatecast: no answer came\n"


def test_a_bug_among_errors_on_purpose_is_raised(failing_demo: FailingDemo) -> None:
    with pytest.raises(ExceptionGroup) as group:
        failing_demo(ExceptionGroup("demo", [AWAY, ZeroDivisionError()]))

    assert group.value.subgroup(ZeroDivisionError)
