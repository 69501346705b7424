"""What the errors of a Redis server mean, as each version words them.

6.2 puts its own words around what a script's command was told, 7.0 adds where that happened, and 7.2 has a code for a
right that is missing within a script.
"""

import pytest

from statecast.components.broker.broker import Outcome, Refused, Unknown, Unreachable
from statecast.components.broker.redis.publishing import outcome_of_error, outcomes_of
from statecast.components.redis.connection import ErrorReply

PLACE = " script: 5f1c, on @user_script:30."
WRAP = "ERR Error running script (call to f_5f1c): @user_script:30: @user_script: 30: "

NOTHING_WAS_DONE = [
    "OOM command not allowed when used memory > 'maxmemory'.",
    "OOM command not allowed when used memory > 'maxmemory'." + PLACE,
    WRAP + "-OOM command not allowed when used memory > 'maxmemory'.",
    "READONLY You can't write against a read only replica.",
    WRAP + "-READONLY You can't write against a read only replica.",
    "@user_script: 30: -READONLY You can't write against a read only replica.",
    "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.",
    "LOADING Redis is loading the dataset in memory",
    "BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.",
    "MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist to disk.",
    "NOREPLICAS Not enough good replicas to write.",
    "NOAUTH Authentication required.",
    "WRONGPASS invalid username-password pair or user is disabled.",
    "DENIED Redis is running in protected mode because protected mode is enabled.",
    "NOSCRIPT No matching script. Please use EVAL.",
    "CLUSTERDOWN Hash slot not served",
    "MOVED 866 127.0.0.1:7001",
    "TRYAGAIN Multiple keys request during rehashing of slot",
    "ERR unknown command 'EVALSHA', with args beginning with: '5f1c' '1' 't' ",
]
NOT_KNOWN_WHAT_WAS_DONE = [
    "ERR user_script:30: attempt to index a nil value" + PLACE,
    "ERR Error running script (call to f_5f1c): @user_script:30: user_script:30: attempt to index a nil value",
    "ERR upstream failure",
]
MISSING_RIGHT = "NOPERM User clerk has no permissions to run the 'evalsha' command"
MISSING_RIGHT_IN_SCRIPT = [
    "NOPERM ACL failure in script: User clerk has no permissions to run the 'xadd' command",
    "ERR ACL failure in script: User clerk has no permissions to run the 'xadd' command",
    "@user_script: 30: The user executing the script can't run this command or subcommand",
    "@user_script: 30: The user executing the script can't access at least one of the keys mentioned in the command",
]
TOO_LARGE = "ERR Protocol error: invalid bulk length"


def of_one_entry(text: str) -> Outcome:
    """The outcome of a message whose XADD was answered with this, within the script."""
    [outcome] = outcomes_of([[1, text.encode()]], 1)
    return outcome


@pytest.mark.parametrize("text", NOTHING_WAS_DONE)
def test_what_a_server_does_not_begin_is_not_done_and_can_be_tried_again(text: str) -> None:
    error = ErrorReply(text)

    assert error.is_refusal
    assert outcome_of_error(error, is_alone=True) == Unreachable(text)
    assert of_one_entry(text) == Unreachable(text)


@pytest.mark.parametrize("text", NOT_KNOWN_WHAT_WAS_DONE)
def test_what_fails_in_the_midst_is_unknown_but_a_single_entry_that_fails_is_not_there(text: str) -> None:
    error = ErrorReply(text)

    assert not error.is_refusal
    assert outcome_of_error(error, is_alone=True) == Unknown(text)
    assert of_one_entry(text) == Unreachable(text)


@pytest.mark.parametrize("text", [MISSING_RIGHT, *MISSING_RIGHT_IN_SCRIPT])
def test_a_missing_right_is_the_topics(text: str) -> None:
    assert outcome_of_error(ErrorReply(text), is_alone=False) == Refused(text, is_about_topic=True)
    assert of_one_entry(text) == Refused(text, is_about_topic=True)


@pytest.mark.parametrize("text", MISSING_RIGHT_IN_SCRIPT)
def test_a_right_that_is_missing_within_a_script_proves_nothing_about_what_it_did_before(text: str) -> None:
    assert not ErrorReply(text + PLACE).is_refusal
    assert ErrorReply(MISSING_RIGHT).is_refusal


def test_a_message_that_is_too_large_is_refused_for_its_own_sake_and_no_other() -> None:
    assert outcome_of_error(ErrorReply(TOO_LARGE), is_alone=True) == Refused(TOO_LARGE)
    assert outcome_of_error(ErrorReply(TOO_LARGE), is_alone=False) == Unknown(TOO_LARGE)
    assert of_one_entry("ERR Elements are too large to be stored") == Refused("ERR Elements are too large to be stored")
