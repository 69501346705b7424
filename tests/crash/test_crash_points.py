"""What the crash matrix does not show: that what is armed wrongly says so, and that what is not armed is not there."""

import os
import subprocess
import sys

import pytest

from statecast.testing.crash_points import POINTS, VARIABLE, arm, arm_from_environment


def test_a_point_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no crash point 'publish\.during'; there are commit\.before,"):
        arm("publish.during")


def test_a_passage_below_the_first_is_refused() -> None:
    with pytest.raises(ValueError, match="the first passage is 1, not 0"):
        arm("publish.after", 0)


@pytest.mark.parametrize("text", ["publish.after:", "publish.after:soon", "publish:3", ":3"])
def test_a_variable_that_names_no_point_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - int's words are its own
        arm_from_environment({VARIABLE: text})


def test_without_the_variable_nothing_is_armed() -> None:
    assert arm_from_environment({}) is None


def test_what_only_reads_has_no_moment_in_which_it_is_sent() -> None:
    assert {name for name in POINTS if name.startswith("read.")} == {"read.before", "read.after"}


def test_the_runtime_does_not_look_at_the_variable() -> None:
    program = "import statecast, statecast.runtime.app, sys; print([m for m in sys.modules if 'testing' in m])"
    environment = {**os.environ, VARIABLE: "commit.before"}

    told = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)

    assert told.stdout == "[]\n"
