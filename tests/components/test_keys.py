import pytest
from hypothesis import given
from hypothesis import strategies as st

from statecast.components.manifest import Component
from statecast.components.state.keys import KeyPrefix, check_key, key_prefix
from statecast.errors import ComponentError, InvalidRequest

LEGAL_TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])).filter(
    lambda text: "||" not in text
)


def prefix_of(key_prefix_value: str | None, *, namespace: str = "", field: str = "keyPrefix") -> KeyPrefix:
    metadata = {} if key_prefix_value is None else {field: key_prefix_value}
    component = Component(name="StateStore", type="state.in-memory", metadata=metadata)
    return key_prefix(component, app_id="Orders", namespace=namespace)


@pytest.mark.parametrize(
    ("value", "full_key"),
    [
        (None, "Orders||k"),
        ("appid", "Orders||k"),
        ("AppID", "Orders||k"),
        ("name", "StateStore||k"),
        ("NAME", "StateStore||k"),
        ("none", "k"),
        ("None", "k"),
        ("Team1", "team1||k"),
        ("", "||k"),
    ],
)
def test_the_key_prefix_word_decides_what_stands_before_a_key(value: str | None, full_key: str) -> None:
    assert prefix_of(value).full_key("k") == full_key


def test_the_namespace_prefix_is_namespace_dot_app_id() -> None:
    assert prefix_of("Namespace", namespace="Prod").full_key("k") == "Prod.Orders||k"


def test_the_namespace_prefix_without_a_namespace_is_that_of_appid() -> None:
    assert prefix_of("namespace").full_key("k") == prefix_of("appid").full_key("k")


def test_the_namespace_changes_no_other_prefix() -> None:
    assert prefix_of("appid", namespace="prod").full_key("k") == "Orders||k"


def test_the_field_is_found_in_any_spelling() -> None:
    assert prefix_of("none", field="KEYPREFIX").full_key("k") == "k"


@pytest.mark.parametrize("key", ["a|b", "|", "a/b", "a b", "ü", "😀", "", "..", "%2F", "\n"])
def test_all_but_the_separator_is_legal_in_a_key(key: str) -> None:
    check_key(key)


@given(key=LEGAL_TEXT, word=st.one_of(st.none(), LEGAL_TEXT), namespace=LEGAL_TEXT)
def test_a_key_comes_back_as_it_went(key: str, word: str | None, namespace: str) -> None:
    prefix = prefix_of(word, namespace=namespace)

    assert prefix.logical_key(prefix.full_key(key)) == key


@given(one=LEGAL_TEXT, other=LEGAL_TEXT)
def test_two_keys_of_one_prefix_are_never_one_full_key(one: str, other: str) -> None:
    prefix = prefix_of("appid")

    assert (prefix.full_key(one) == prefix.full_key(other)) is (one == other)


def test_a_key_of_another_prefix_is_given_as_it_stands() -> None:
    assert prefix_of("appid").logical_key("carts||k") == "carts||k"


@pytest.mark.parametrize("key", ["a||b", "||", "|||"])
def test_a_key_with_the_separator_is_refused_in_the_words_that_clients_know(key: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        prefix_of("none").full_key(key)

    assert str(refusal.value) == f"input key/keyPrefix '{key}' can't contain '||'"


def test_a_key_with_nul_is_refused_by_every_store_alike() -> None:
    with pytest.raises(InvalidRequest, match=r"'a\\x00b' must not contain NUL"):
        prefix_of("appid").full_key("a\0b")


def test_a_key_with_half_a_surrogate_pair_is_refused_in_a_message_that_can_be_sent() -> None:
    with pytest.raises(InvalidRequest, match="lone surrogate") as refusal:
        prefix_of("appid").full_key("a\ud83d")

    assert "a\\ud83d" in str(refusal.value).encode().decode()


def test_the_message_about_a_separator_beside_half_a_pair_can_be_sent() -> None:
    with pytest.raises(InvalidRequest) as refusal:
        prefix_of("appid").full_key("\ud83d||")

    assert str(refusal.value).encode() == rb"input key/keyPrefix '\ud83d||' can't contain '||'"


def test_a_prefix_with_the_separator_is_an_error_that_names_component_and_field() -> None:
    component = Component("s", "state.redis", metadata={"keyPrefix": "A||b"}, origin="c/s.yaml, document 2")

    with pytest.raises(ComponentError) as failure:
        key_prefix(component, app_id="orders")

    assert str(failure.value) == (
        "c/s.yaml, document 2: component 's': keyPrefix makes the prefix of all keys, which must not contain '||'; "
        "it is 'A||b'"
    )


@pytest.mark.parametrize("app_id", ["a||b", "a\0", "\udc00"])
def test_an_app_id_that_cannot_be_a_prefix_is_an_error(app_id: str) -> None:
    with pytest.raises(ComponentError, match="keyPrefix"):
        key_prefix(Component("s", "state.redis"), app_id=app_id)
