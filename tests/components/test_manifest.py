import json
import logging
from datetime import timedelta
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from statecast.components.manifest import (
    Component,
    EnvRef,
    Inline,
    Manifest,
    SecretKeyRef,
    Source,
    check_app_id,
    parse_manifests,
    select,
)
from statecast.errors import ComponentError, InvalidRequest

HEAD = "apiVersion: dapr.io/v1alpha1\nkind: Component\n"
MINIMAL = HEAD + "metadata: {name: orders}\nspec: {type: state.redis}\n"


def parse_one(text: str) -> Manifest:
    (manifest,) = parse_manifests(text, "c/a.yaml")
    return manifest


def failure_of(text: str) -> str:
    with pytest.raises(ComponentError) as failure:
        parse_manifests(text, "c/a.yaml")
    return str(failure.value)


def with_spec(spec: str) -> str:
    return f"{HEAD}metadata: {{name: orders}}\nspec: {{type: state.redis, {spec}}}\n"


def source_of(value: str) -> Source:
    return parse_one(with_spec(f"metadata: [{{name: f, {value}}}]")).metadata["f"]


def with_value(value: str) -> str:
    """Make a component in which `value: <value>` is a line of its own."""
    return f"{HEAD}metadata: {{name: o}}\nspec:\n  type: t\n  metadata:\n  - name: f\n    value: {value}\n"


def text_of(value: str) -> str:
    match parse_one(with_value(value)).metadata["f"]:
        case Inline(text):
            return text
        case other:
            raise AssertionError(f"{other} is no inline value")


# One component


def test_every_member_of_a_component_is_read() -> None:
    text = """
apiVersion: dapr.io/v1alpha1
kind: Component
metadata:
  name: statestore
  namespace: production
spec:
  type: state.postgresql
  version: v2
  ignoreErrors: true
  initTimeout: 20s
  metadata:
  - name: timeout
    value: "30"
  - name: connectionString
    secretKeyRef:
      name: postgres
      key: url
  - name: tablePrefix
    envRef: TABLE_PREFIX
auth:
  secretStore: vault
scopes:
- orders
- carts
"""

    assert parse_one(text) == Manifest(
        name="statestore",
        type="state.postgresql",
        version="v2",
        namespace="production",
        metadata={
            "timeout": Inline("30"),
            "connectionString": SecretKeyRef("postgres", "url"),
            "tablePrefix": EnvRef("TABLE_PREFIX"),
        },
        secret_store="vault",
        scopes=("orders", "carts"),
        ignore_errors=True,
        init_timeout=timedelta(seconds=20),
        origin="c/a.yaml, document 1",
    )


def test_name_and_type_are_enough() -> None:
    assert parse_one(MINIMAL) == Manifest(name="orders", type="state.redis", origin="c/a.yaml, document 1")


def test_member_names_match_in_any_case_and_unknown_members_are_ignored() -> None:
    text = """
APIVERSION: dapr.io/v1alpha1
Kind: Component
METADATA: {NAME: orders, labels: {a: b}}
Spec:
  TYPE: state.redis
  Metadata:
  - {NAME: p, SecretKeyRef: {Name: s, KEY: k}}
Auth: {secretstore: vault}
SCOPES: [orders]
extra: true
"""

    manifest = parse_one(text)

    assert (manifest.name, manifest.secret_store, manifest.scopes) == ("orders", "vault", ("orders",))
    assert manifest.metadata == {"p": SecretKeyRef("s", "k")}


def test_type_and_version_are_lower_cased() -> None:
    manifest = parse_one(HEAD + "metadata: {name: Orders}\nspec: {type: State.PostgreSQL, version: V2}")

    assert (manifest.name, manifest.type, manifest.version) == ("Orders", "state.postgresql", "v2")


def test_numbers_are_taken_for_text() -> None:
    manifest = parse_one(HEAD + "metadata: {name: 123}\nspec: {type: state.redis, version: 1}\nscopes: [7]")

    assert (manifest.name, manifest.version, manifest.scopes) == ("123", "1", ("7",))


@pytest.mark.parametrize("empty", ["", "null", "~", "[]"])
def test_metadata_may_be_absent_or_empty(empty: str) -> None:
    assert parse_one(with_spec(f"metadata: {empty}")).metadata == {}


# Values


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("plain", "plain"),
        ("'5'", "5"),
        ("5", "5"),
        ("-5", "-5"),
        ("5.0", "5"),
        ("1.10", "1.1"),
        ("0.25", "0.25"),
        ("1e3", "1000"),
        ("0x1F", "31"),
        ("0o17", "15"),
        ("1_000", "1000"),
        ("true", "true"),
        ("yes", "true"),
        ("Off", "false"),
        ("'yes'", "yes"),
        ("[a, 1, true, null]", '["a",1,true,null]'),
        ("{a: {b: 1.5}}", '{"a":{"b":1.5}}'),
        ("{2: a, true: b}", '{"2":"a","true":"b"}'),
        ("'{\"a\": 1}'", '{"a": 1}'),
        ("|\n      two\n      lines", "two\nlines\n"),
        ("ü😀", "ü😀"),
        ("[ü]", '["ü"]'),
        ("", ""),
        ("null", ""),
        ("12345678901234567890123", "12345678901234567890123"),
    ],
)
def test_a_value_is_text_or_the_json_text_of_what_it_is(value: str, text: str) -> None:
    assert text_of(value) == text


@pytest.mark.parametrize("value", ["12:30:45", "2024-01-31", "2024-01-31T10:00:00Z", "127.0.0.1:6379", ".inf", "="])
def test_what_only_pyyaml_takes_for_a_date_or_a_number_stays_text(value: str) -> None:
    assert text_of(value) == value


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufeff\u2028\u2029\ufffe\uffff")))
def test_a_quoted_value_is_given_as_it_stands(text: str) -> None:
    assert text_of("'" + text.replace("'", "''") + "'") == text


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner),
    max_leaves=8,
)


@given(st.lists(json_values) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), json_values))
def test_an_object_in_a_json_document_comes_out_as_the_same_json(value: Any) -> None:
    document = {
        "apiVersion": "dapr.io/v1alpha1",
        "kind": "Component",
        "metadata": {"name": "o"},
        "spec": {"type": "t", "metadata": [{"name": "f", "value": value}]},
    }

    source = parse_one(json.dumps(document, indent="\t")).metadata["f"]

    assert isinstance(source, Inline)
    assert json.loads(source.text) == value


def test_a_missing_value_is_empty_text() -> None:
    assert parse_one(with_spec("metadata: [{name: f}]")).metadata == {"f": Inline("")}


def test_the_key_of_a_secret_is_its_name_unless_given() -> None:
    assert source_of("secretKeyRef: {name: redis}") == SecretKeyRef("redis", "redis")
    assert source_of("secretKeyRef: {name: redis, key: ''}") == SecretKeyRef("redis", "redis")


def test_a_secret_goes_before_a_value_and_a_value_before_the_environment() -> None:
    assert source_of("value: v, secretKeyRef: {name: s}, envRef: E") == SecretKeyRef("s", "s")
    assert source_of("value: v, envRef: E") == Inline("v")
    assert source_of("value: '', envRef: E") == EnvRef("E")


def test_of_a_name_given_twice_the_last_one_counts_and_it_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    manifest = parse_one(with_spec("metadata: [{name: f, value: hidden-1}, {name: f, value: hidden-2}]"))

    assert manifest.metadata == {"f": Inline("hidden-2")}
    assert "spec.metadata[1] gives 'f' again" in caplog.text
    assert "hidden" not in caplog.text


# The time to open


@pytest.mark.parametrize(
    ("text", "timeout"),
    [("500ms", timedelta(milliseconds=500)), ("1m", timedelta(minutes=1)), ("7", timedelta(seconds=7))],
)
def test_init_timeout_is_a_duration(text: str, timeout: timedelta) -> None:
    assert parse_one(with_spec(f"initTimeout: {text}")).init_timeout == timeout


@pytest.mark.parametrize("text", ["0s", "-3s", "''", "null"])
def test_an_init_timeout_of_nothing_is_five_seconds(text: str) -> None:
    assert parse_one(with_spec(f"initTimeout: {text}")).init_timeout == timedelta(seconds=5)


# Documents


def test_a_file_may_hold_several_documents_and_each_knows_its_number() -> None:
    first, second = (MINIMAL.replace("orders", name) for name in ("one", "two"))

    manifests = parse_manifests(f"# head\n---\n{first}--- # next\n{second}---\n", "c/a.yaml")

    assert [(each.name, each.origin) for each in manifests] == [
        ("one", "c/a.yaml, document 1"),
        ("two", "c/a.yaml, document 2"),
    ]


def test_lines_may_end_as_on_windows() -> None:
    text = f"---\n{MINIMAL}---\n{MINIMAL}".replace("\n", "\r\n")

    assert [each.origin[-1] for each in parse_manifests(text, "a")] == ["1", "2"]


def test_a_directive_before_the_first_document_is_no_document() -> None:
    assert parse_one(f"%YAML 1.1\n# c\n---\n{MINIMAL}").origin == "c/a.yaml, document 1"


def test_dashes_inside_a_line_or_a_value_separate_nothing() -> None:
    assert text_of("|\n      ---\n      a---") == "---\na---\n"


@pytest.mark.parametrize("text", ["", "\n", "# nothing\n", "---\n---\n"])
def test_an_empty_file_holds_no_component(text: str) -> None:
    assert parse_manifests(text, "a.yaml") == []


@pytest.mark.parametrize(
    "text",
    [
        "apiVersion: dapr.io/v1alpha1\nkind: Subscription\nspec: {topic: a}\n",
        "apiVersion: dapr.io/v1alpha1\nkind: component\n",
        "apiVersion: dapr.io/v2alpha1\nkind: Component\n",
        "apiVersion: v1\nkind: ConfigMap\n",
        "services: {redis: {image: redis}}\n",
        "kind: Template\nresources: {queue: !Ref orders, names: !Split [',', a], all: !Of {a: b}}\n",
        "- a\n- list\n",
        "a word",
        '{"redisPassword": "x"}',
        "[1, 2]",
    ],
)
def test_what_is_no_component_is_passed_over_in_silence(text: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    manifests = parse_manifests(f"{text}\n---\n{MINIMAL}", "a.yaml")

    assert [each.name for each in manifests] == ["orders"]
    assert not caplog.records


def test_json_may_stand_in_a_yaml_file_tabs_and_escapes_included() -> None:
    document = {
        "apiVersion": "dapr.io/v1alpha1",
        "kind": "Component",
        "metadata": {"name": "o"},
        "spec": {"type": "t", "metadata": [{"name": "f", "value": "😀/"}]},
    }
    text = json.dumps(document, indent="\t").replace("/v1", "\\/v1")

    manifests = parse_manifests(f"{text}\n---\n{MINIMAL}", "c/a.yaml")

    assert manifests[0].metadata == {"f": Inline("😀/")}
    assert manifests[1].name == "orders"


def test_json_may_stand_below_comments() -> None:
    text = json.dumps({"apiVersion": "dapr.io/v1alpha1", "kind": "Component", "metadata": {"name": "o"}}, indent="\t")

    assert "spec.type is required" in failure_of(f"# orders\n\n  # of the shop\n{text}")


def test_a_pair_of_escapes_in_yaml_is_one_sign_as_in_json() -> None:
    assert text_of(r'"\ud83d\ude00"') == "😀"
    assert text_of(r'{"a": "\ud83d\ude00"}') == '{"a":"😀"}'
    assert text_of(r'"\ud83d"') == "\ud83d"


def test_a_yaml_flow_mapping_is_not_taken_for_broken_json() -> None:
    assert (
        parse_one("{apiVersion: dapr.io/v1alpha1, kind: Component, metadata: {name: o}, spec: {type: t}}").name == "o"
    )


def test_anchors_and_merges_work() -> None:
    text = HEAD + "metadata: {name: o}\nspec: {type: t, metadata: [&f {name: f, value: 1}, {<<: *f, name: g}]}"

    assert parse_one(text).metadata == {"f": Inline("1"), "g": Inline("1")}


# What is wrong with a file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD, "c/a.yaml, document 1: metadata.name is required: a name such as statestore"),
        (HEAD + "metadata: {name: ''}", "c/a.yaml, document 1: metadata.name is required: a name such as statestore"),
        (HEAD + "metadata: x", "c/a.yaml, document 1: metadata must be a mapping"),
        (HEAD + "metadata: {name: [a]}", "c/a.yaml, document 1: metadata.name must be text"),
        (
            HEAD + "metadata: {name: o}",
            "c/a.yaml, document 1: component 'o': spec.type is required: a type such as state.redis",
        ),
        (HEAD + "metadata: {name: o}\nspec: []", "c/a.yaml, document 1: component 'o': spec must be a mapping"),
        (with_spec("metadata: {a: b}"), "c/a.yaml, document 1: component 'orders': spec.metadata must be a list"),
        (with_spec("metadata: [a]"), "c/a.yaml, document 1: component 'orders': spec.metadata[0] must be a mapping"),
        (
            with_spec("metadata: [{name: a}, {value: b}]"),
            "c/a.yaml, document 1: component 'orders': spec.metadata[1].name is required: "
            "the name of a field such as redisHost",
        ),
        (
            with_spec("metadata: [{name: a, secretKeyRef: {key: k}}]"),
            "c/a.yaml, document 1: component 'orders': spec.metadata[0].secretKeyRef.name is required: "
            "the name of a secret",
        ),
        (
            with_spec("metadata: [{name: a, secretKeyRef: s}]"),
            "c/a.yaml, document 1: component 'orders': spec.metadata[0].secretKeyRef must be a mapping",
        ),
        (
            with_spec("metadata: [{name: a, value: !!binary aGk=}]"),
            "c/a.yaml, document 1: component 'orders': spec.metadata[0].value must be text, a number, true, false, "
            "or a list or mapping of these",
        ),
        (
            with_spec("ignoreErrors: 'true'"),
            "c/a.yaml, document 1: component 'orders': spec.ignoreErrors must be true or false",
        ),
        (
            with_spec("initTimeout: soon"),
            "c/a.yaml, document 1: component 'orders': spec.initTimeout takes a duration such as 500ms, 20s or 1m; "
            "it is 'soon'",
        ),
        (MINIMAL + "scopes: orders", "c/a.yaml, document 1: component 'orders': scopes must be a list"),
        (MINIMAL + "scopes: [a, '']", "c/a.yaml, document 1: component 'orders': scopes[1] is required: an app id"),
        (MINIMAL + "auth: vault", "c/a.yaml, document 1: component 'orders': auth must be a mapping"),
    ],
)
def test_a_broken_field_is_named_with_file_document_and_what_is_expected(text: str, message: str) -> None:
    assert failure_of(text) == message


@pytest.mark.parametrize("name", [".", "..", "a/b", "a%b"])
def test_a_name_that_cannot_stand_in_a_url_path_is_an_error(name: str) -> None:
    message = failure_of(f"{HEAD}metadata: {{name: '{name}'}}\nspec: {{type: t}}")

    assert message.startswith("c/a.yaml, document 1: metadata.name must not be '.' or '..' nor contain '/' or '%'")
    assert repr(name) in message


@pytest.mark.parametrize(
    "value",
    [
        *("&a [*a]", "!!python/object:os.system {}", ".nan_", "{[a]: b}", "!!int x", "!!int ''", "!!float ''"),
        *("!!bool x", "!!timestamp x", "!!timestamp 2024-99-99", "!!binary x"),
    ],
)
def test_no_value_gets_past_the_parser_as_another_error(value: str) -> None:
    try:
        parse_manifests(with_spec(f"metadata: [{{name: f, value: {value}}}]"), "a.yaml")
    except ComponentError as error:
        assert str(error).startswith("a.yaml, document 1")  # noqa: PT017 - some are text, some are errors


def test_the_document_that_is_broken_is_counted_and_the_line_is_that_of_the_file() -> None:
    message = failure_of(f"{MINIMAL}---\n{HEAD}metadata:\n  name: a\n  name b\nspec: {{}}\n")

    assert message.startswith("c/a.yaml, document 2, line 11: ")
    assert message.endswith("; YAML or JSON is expected")


@pytest.mark.parametrize("text", ['{"a":' + "[" * 50_000, "[" * 50_000])
def test_a_document_that_is_nested_too_deep_is_an_error(text: str) -> None:
    assert failure_of(text) == "c/a.yaml, document 1: it is nested too deep; YAML or JSON is expected"


def test_a_syntax_error_does_not_show_the_lines_around_it() -> None:
    text = with_spec("metadata: [{name: password, value: s3cr3t}, {]")

    with pytest.raises(ComponentError) as failure:
        parse_manifests(text, "a.yaml")

    assert "s3cr3t" not in str(failure.value)
    assert failure.value.__cause__ is None
    assert failure.value.__context__ is None


@pytest.mark.parametrize(
    "value", ["*s3cr3t", "!s3cr3t", "!s3cr3t x", "!s3!cr3t x", "!<s3cr3t> x", "!!python/name:s3cr3t x", "!!bool s3cr3t"]
)
def test_a_value_that_yaml_takes_for_something_else_is_an_error_that_does_not_show_it(value: str) -> None:
    assert "cr3t" not in failure_of(with_value(value))


def test_a_tag_is_no_value_of_a_field() -> None:
    message = failure_of(with_value("!s3cr3t"))

    assert message.startswith("c/a.yaml, document 1: component 'o': spec.metadata[0].value must be text")


def test_a_component_that_ignores_errors_is_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    broken = with_spec("ignoreErrors: true, metadata: x")

    manifests = parse_manifests(f"{broken}---\n{MINIMAL}", "c/a.yaml")

    assert [each.origin for each in manifests] == ["c/a.yaml, document 2"]
    assert "c/a.yaml, document 1: component 'orders': spec.metadata must be a list" in caplog.text


def test_no_repr_shows_a_value() -> None:
    manifest = parse_one(with_spec("metadata: [{name: password, value: s3cr3t}]"))

    assert "s3cr3t" not in repr(manifest) + repr(manifest.metadata)


@given(st.text(st.sampled_from("{}[]:,-&*!|>'\"%@`# \n\tax0")))
def test_any_text_is_parsed_or_a_component_error(text: str) -> None:
    try:
        parse_manifests(HEAD + text, "a.yaml")
    except ComponentError as error:
        assert str(error).startswith("a.yaml, document")  # noqa: PT017 - most texts raise, some do not


@given(st.dictionaries(st.from_regex(r"[a-z]{1,8}", fullmatch=True), st.text(st.characters(codec="ascii")), max_size=5))
def test_whatever_yaml_writes_of_text_is_read_back(metadata: dict[str, str]) -> None:
    document = {
        "apiVersion": "dapr.io/v1alpha1",
        "kind": "Component",
        "metadata": {"name": "o"},
        "spec": {"type": "t", "metadata": [{"name": name, "value": value} for name, value in metadata.items()]},
    }

    # Quoted, since what PyYAML takes for text and leaves plain (`0E0`) may be a number for others.
    manifest = parse_one(yaml.safe_dump(document, default_style='"'))

    assert manifest.metadata == {name: Inline(value) for name, value in metadata.items()}


# Which components are meant


def named(name: str, number: int = 1, **members: Any) -> Manifest:
    return Manifest(name, "state.redis", origin=f"c/a.yaml, document {number}", **members)


def test_components_outside_the_scopes_are_passed_over_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    ours, theirs, everyones = named("a", scopes=("orders", "x")), named("b", scopes=("carts",)), named("c")

    assert select([ours, theirs, everyones], app_id="orders") == [ours, everyones]
    assert not caplog.records


def test_scopes_hold_for_components_made_by_hand_too() -> None:
    assert select([Component("a", "state.redis", scopes=("carts",))], app_id="orders") == []


@pytest.mark.parametrize(
    ("own", "environment", "is_kept"),
    [("prod", "prod", True), ("prod", "test", False), ("prod", "", True), ("", "prod", True), ("", "", True)],
)
def test_a_namespace_counts_where_both_sides_name_one(own: str, environment: str, is_kept: bool) -> None:
    assert bool(select([named("a", namespace=own)], app_id="orders", namespace=environment)) is is_kept


def test_a_name_given_twice_is_an_error_that_names_both_places() -> None:
    with pytest.raises(ComponentError) as failure:
        select([named("a", 1), Manifest("a", "pubsub.redis", origin="c/b.yaml, document 3")], app_id="orders")

    assert str(failure.value) == (
        "c/b.yaml, document 3: component 'a' (pubsub.redis) is a duplicate definition: "
        "c/a.yaml, document 1: component 'a' (state.redis) has that name; "
        "a name is given once over all types and files"
    )


def test_one_name_in_two_scopes_or_namespaces_is_two_components() -> None:
    ours, theirs = named("a", 1, scopes=("orders",)), named("a", 2, scopes=("carts",))
    here, there = named("b", 3, namespace="prod"), named("b", 4, namespace="test")

    assert select([ours, theirs, here, there], app_id="orders", namespace="prod") == [ours, here]
    assert select([theirs, ours, there, here], app_id="orders", namespace="prod") == [ours, here]


# App ids


def test_an_app_id_is_neither_empty_nor_dotted() -> None:
    check_app_id("orders")
    with pytest.raises(InvalidRequest, match="parameter app-id cannot be empty"):
        check_app_id("")
    with pytest.raises(InvalidRequest, match=r"'a\.b' .* parameter app-id cannot contain dots"):
        check_app_id("a.b")
