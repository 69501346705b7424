import json
import logging
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from statecast.components.manifest import Component, EnvRef, Inline, Manifest, SecretKeyRef, Source
from statecast.components.secrets import LocalEnvSecretStore, LocalFileSecretStore, SecretStore, resolve
from statecast.errors import ComponentError

SECRET = "s3cr3t-value"

WriteSecrets = Callable[[object], Path]


@pytest.fixture
def write_secrets(tmp_path: Path) -> WriteSecrets:
    def write(content: object) -> Path:
        path = tmp_path / "secrets.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def secrets_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("secrets") / "secrets.json"


def file_store(path: Path, **fields: str) -> LocalFileSecretStore:
    return LocalFileSecretStore(
        Component("vault", "secretstores.local.file", metadata={"secretsFile": str(path), **fields}, origin="v.yaml")
    )


def file_manifest(path: Path, **fields: str) -> Manifest:
    metadata = {name: Inline(value) for name, value in {"secretsFile": str(path), **fields}.items()}
    return Manifest("vault", "secretstores.local.file", metadata=metadata, origin="v.yaml, document 1")


def env_manifest(**fields: str) -> Manifest:
    return Manifest("env", "secretstores.local.env", metadata={name: Inline(v) for name, v in fields.items()})


def manifest(source: Source, *, secret_store: str = "", field: str = "f", ignore_errors: bool = False) -> Manifest:
    return Manifest(
        "orders",
        "state.redis",
        metadata={field: source},
        secret_store=secret_store,
        ignore_errors=ignore_errors,
        origin="c/a.yaml, document 2",
    )


def value_of(source: Source, environment: dict[str, str] | None = None) -> str:
    (component,) = resolve([manifest(source)], "orders-app", environment or {})
    return component.metadata["f"]


def failure_of(*manifests: Manifest, environment: dict[str, str] | None = None) -> str:
    with pytest.raises(ComponentError) as failure:
        resolve(manifests, "orders-app", environment or {})
    shown = "".join(traceback.format_exception(failure.value))
    assert SECRET not in shown
    return str(failure.value)


# secretstores.local.file


def test_a_tree_is_flattened_to_secrets_of_one_value_each(write_secrets: WriteSecrets) -> None:
    store = file_store(write_secrets({"redisPassword": "a", "sql": {"url": "b", "deep": {"er": "c"}}, "list": ["d"]}))

    assert store.secret("redisPassword") == {"redisPassword": "a"}
    assert store.secret("sql:url") == {"sql:url": "b"}
    assert store.secret("sql:deep:er") == {"sql:deep:er": "c"}
    assert store.secret("list:0") == {"list:0": "d"}
    assert store.secret("sql") is None
    assert store.secret("REDISPASSWORD") is None


def test_numbers_and_booleans_are_the_text_that_stands_in_the_file(write_secrets: WriteSecrets) -> None:
    store = file_store(write_secrets('{"n": 5, "f": 1.10, "e": 1E400, "t": true, "x": false, "nothing": null}'))

    texts = [store.secret(name) for name in ("n", "f", "e", "t", "x", "nothing")]

    assert texts == [{"n": "5"}, {"f": "1.10"}, {"e": "1E400"}, {"t": "true"}, {"x": "false"}, None]


def test_the_separator_can_be_chosen(write_secrets: WriteSecrets) -> None:
    store = file_store(write_secrets({"a": {"b": "c"}}), nestedSeparator="__")

    assert store.secret("a__b") == {"a__b": "c"}


def test_with_multi_valued_each_member_is_one_secret_with_flattened_sub_keys(write_secrets: WriteSecrets) -> None:
    store = file_store(
        write_secrets({"single": "a", "port": 5, "sql": {"url": "b", "deep": {"er": ["c"]}}, "nothing": None}),
        multiValued="true",
    )

    assert store.secret("single") == {"single": "a"}
    assert store.secret("port") == {"port": "5"}
    assert store.secret("sql") == {"url": "b", "deep:er:0": "c"}
    assert store.secret("sql:url") is None
    assert store.secret("nothing") is None


names = st.text(st.characters(exclude_characters=":", exclude_categories=["Cs"]), min_size=1)
trees = st.recursive(
    st.text(st.characters(exclude_categories=["Cs"])), lambda inner: st.dictionaries(names, inner), max_leaves=5
)


def leaf_paths(tree: object, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], str]:
    if isinstance(tree, dict):
        return {p: leaf for name, member in tree.items() for p, leaf in leaf_paths(member, (*path, name)).items()}
    return {path: str(tree)}


@settings(max_examples=50)
@given(tree=st.dictionaries(names, trees, max_size=3))
def test_every_leaf_of_any_tree_is_found_by_its_path(tree: dict[str, object], secrets_path: Path) -> None:
    secrets_path.write_text(json.dumps(tree))
    single, multi = file_store(secrets_path), file_store(secrets_path, multiValued="true")

    for leaf_path, text in leaf_paths(tree).items():
        name = ":".join(leaf_path)
        assert single.secret(name) == {name: text}
        assert (multi.secret(leaf_path[0]) or {})[":".join(leaf_path[1:]) or leaf_path[0]] == text


def test_the_file_may_have_a_byte_order_mark(write_secrets: WriteSecrets) -> None:
    assert file_store(write_secrets('\ufeff{"a": "b"}')).secret("a") == {"a": "b"}


def test_a_relative_path_starts_at_the_working_directory(
    write_secrets: WriteSecrets, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_secrets({"a": "b"})
    monkeypatch.chdir(path.parent)

    assert file_store(Path("secrets.json")).secret("a") == {"a": "b"}


def test_a_file_that_is_not_there_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "none.json"

    message = failure_of(file_manifest(path))

    expected = "v.yaml, document 1: component 'vault': secretsFile cannot be read: No such file or directory"
    assert message == f"{expected}; it is {str(path)!r}"


def test_no_file_named_is_an_error() -> None:
    message = failure_of(Manifest("vault", "secretstores.local.file", origin="v.yaml, document 1"))

    assert message == "v.yaml, document 1: component 'vault': secretsFile is required"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (f'{{"a": "{SECRET}",, }}', "line 1, column 2"),
        (f'["{SECRET}"]', "another kind of value"),
        (f'"{SECRET}"', "another kind of value"),
        ("", "line 1, column 1"),
        ('{"a":' + "[" * 100_000, "nested too deep"),
    ],
)
def test_a_file_that_is_no_json_object_is_an_error_that_shows_nothing_of_it(
    content: str, reason: str, write_secrets: WriteSecrets
) -> None:
    message = failure_of(file_manifest(write_secrets(content)))

    assert "component 'vault': secretsFile must be a JSON object: " in message
    assert reason in message


def test_a_file_that_is_not_utf_8_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "secrets.json"
    path.write_bytes(b'{"a": "\xff' + SECRET.encode() + b'"}')

    assert "must be a JSON object: it is not UTF-8 text" in failure_of(file_manifest(path))


# secretstores.local.env


def env_store(environment: dict[str, str], **fields: str) -> SecretStore:
    return LocalEnvSecretStore(Component("env", "secretstores.local.env", metadata=fields), environment)


def test_a_variable_of_the_environment_is_a_secret_of_one_value() -> None:
    assert env_store({"PASSWORD": "a"}).secret("PASSWORD") == {"PASSWORD": "a"}


def test_a_prefix_is_put_before_the_name_that_is_asked_for() -> None:
    store = env_store({"APP_PASSWORD": "a", "PASSWORD": "b"}, prefix="APP_")

    assert store.secret("PASSWORD") == {"PASSWORD": "a"}


def test_a_variable_that_is_not_set_is_no_secret_but_an_empty_one_is() -> None:
    store = env_store({"EMPTY": ""})

    assert store.secret("EMPTY") == {"EMPTY": ""}
    assert store.secret("UNSET") is None


@pytest.mark.parametrize("variable", ["APP_API_TOKEN", "DAPR_API_TOKEN", "dapr_api_token"])
def test_the_runtimes_own_variables_are_no_secrets(variable: str) -> None:
    assert env_store({variable: SECRET}).secret(variable) is None
    assert env_store({variable: SECRET}, prefix=variable[:4]).secret(variable[4:]) is None


# Secret references


def test_a_secret_is_taken_from_the_store_that_the_component_names(write_secrets: WriteSecrets) -> None:
    path = write_secrets({"redis": "p"})

    component = resolve(
        [manifest(SecretKeyRef("redis", "redis"), secret_store="vault"), file_manifest(path)], "orders-app", {}
    )[1]

    assert component.metadata == {"f": "p"}


def test_a_sub_key_of_a_secret_is_taken(write_secrets: WriteSecrets) -> None:
    path = write_secrets({"redis": {"password": "p", "user": "u"}})

    component = resolve(
        [file_manifest(path, multiValued="true"), manifest(SecretKeyRef("redis", "user"), secret_store="vault")],
        "a",
        {},
    )[1]

    assert component.metadata == {"f": "u"}


def test_secret_stores_come_first_and_all_else_keeps_its_order(write_secrets: WriteSecrets) -> None:
    first, last = Manifest("z", "state.redis"), Manifest("a", "pubsub.redis")

    components = resolve([first, env_manifest(), last, file_manifest(write_secrets({}))], "orders-app", {})

    assert [each.name for each in components] == ["env", "vault", "z", "a"]


def test_a_secret_store_may_take_its_own_fields_from_one_before_it(write_secrets: WriteSecrets) -> None:
    path = write_secrets({"redis": "p"})
    second = Manifest(
        "vault",
        "secretstores.local.file",
        metadata={"secretsFile": SecretKeyRef("SECRETS_FILE", "SECRETS_FILE")},
        secret_store="env",
    )
    third = manifest(SecretKeyRef("redis", "redis"), secret_store="vault")

    components = resolve([env_manifest(), second, third], "orders-app", {"SECRETS_FILE": str(path)})

    assert components[2].metadata == {"f": "p"}


def test_a_secret_store_made_by_hand_serves_manifests(write_secrets: WriteSecrets) -> None:
    store = Component("env", "secretstores.local.env")

    components = resolve([manifest(SecretKeyRef("P", "P"), secret_store="env"), store], "orders-app", {"P": "p"})

    assert components[0] is store
    assert components[1].metadata == {"f": "p"}


def test_everything_else_of_a_manifest_is_handed_on() -> None:
    given_manifest = manifest(Inline("v"), ignore_errors=True)

    assert resolve([given_manifest], "orders-app", {}) == [
        Component(
            name="orders",
            type="state.redis",
            metadata={"f": "v"},
            ignore_errors=True,
            origin="c/a.yaml, document 2",
        )
    ]


def test_a_reference_without_a_secret_store_is_an_error() -> None:
    assert failure_of(env_manifest(), manifest(SecretKeyRef("P", "P")), environment={"P": SECRET}) == (
        "c/a.yaml, document 2: component 'orders': f has a secretKeyRef, but the component names no secret store; "
        "auth.secretStore must be the name of a secretstores component"
    )


def test_a_secret_store_that_is_not_loaded_is_an_error() -> None:
    assert failure_of(env_manifest(), manifest(SecretKeyRef("P", "P"), secret_store="kubernetes")) == (
        "c/a.yaml, document 2: component 'orders': f refers to secret store 'kubernetes', which is not loaded; "
        "loaded are: env"
    )


def test_a_missing_secret_is_an_error_with_a_hint(write_secrets: WriteSecrets) -> None:
    path = write_secrets({"redis": {"password": SECRET}})

    assert failure_of(file_manifest(path), manifest(SecretKeyRef("redis", "password"), secret_store="vault")) == (
        "c/a.yaml, document 2: component 'orders': f refers to secret 'redis', which its secret store does not have; "
        "did you mean 'redis:password'?"
    )


def test_an_unset_variable_is_a_missing_secret() -> None:
    assert failure_of(env_manifest(), manifest(SecretKeyRef("P", "P"), secret_store="env")) == (
        "c/a.yaml, document 2: component 'orders': f refers to secret 'P', which its secret store does not have"
    )


def test_a_missing_sub_key_is_an_error_that_lists_the_keys(write_secrets: WriteSecrets) -> None:
    path = write_secrets({"mysecret": SECRET})

    assert failure_of(file_manifest(path), manifest(SecretKeyRef("mysecret", "mykey"), secret_store="vault")) == (
        "c/a.yaml, document 2: component 'orders': f refers to key 'mykey' of secret 'mysecret', "
        "which has no such key; it has: 'mysecret'"
    )


def test_a_component_that_ignores_errors_is_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    broken = manifest(SecretKeyRef("P", "P"), ignore_errors=True)

    components = resolve([broken, Manifest("other", "state.redis")], "orders-app", {})

    assert [each.name for each in components] == ["other"]
    assert "component 'orders': f has a secretKeyRef" in caplog.text


def test_an_unknown_kind_of_secret_store_is_an_error_that_lists_the_known() -> None:
    assert failure_of(Manifest("v", "secretstores.kubernetes")) == (
        "component 'v': unknown type 'secretstores.kubernetes'; "
        "known secret stores are secretstores.local.env, secretstores.local.file"
    )


def test_secret_stores_have_version_one_alone() -> None:
    resolve([Manifest("v", "secretstores.local.env", version="v1")], "orders-app", {})

    assert failure_of(Manifest("v", "secretstores.local.env", version="v2")) == (
        "component 'v': secretstores.local.env has version 'v2': leave it out, or give v1"
    )


# References to the environment


def test_a_reference_to_the_environment_is_its_text() -> None:
    assert value_of(EnvRef("HOST"), {"HOST": "h:1"}) == "h:1"


def test_a_variable_that_is_not_set_leaves_the_field_empty_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert value_of(EnvRef("HOST")) == ""
    assert "component 'orders': f refers to environment variable 'HOST', which is not set" in caplog.text


@pytest.mark.parametrize("variable", ["APP_API_TOKEN", "DAPR_API_TOKEN", "dapr_x", "A B"])
def test_a_variable_that_components_may_not_read_leaves_the_field_empty_with_a_warning(
    variable: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert value_of(EnvRef(variable), {variable: SECRET}) == ""
    assert f"{variable!r}, which components may not read" in caplog.text
    assert SECRET not in caplog.text


def test_dapr_env_keys_lists_what_may_be_read() -> None:
    environment = {"A": "1", "B": "2", "C": "3", "DAPR_ENV_KEYS": "A C"}

    assert [value_of(EnvRef(name), environment) for name in "ABC"] == ["1", "", "3"]


# Templates


def test_templates_are_expanded_wherever_they_stand() -> None:
    environment = {"POD_NAME": "pod-1", "NAMESPACE": "prod"}

    text = value_of(Inline("{appID}/{namespace}/{podName}/{appID}/{other}/{appid}"), environment)

    assert text == "orders-app/prod.orders-app/pod-1/orders-app/{other}/{appid}"


def test_a_namespace_in_a_broker_is_warned_about_since_its_topics_stay_as_they_are(
    caplog: pytest.LogCaptureFixture,
) -> None:
    broker = replace(manifest(Inline("{namespace}"), field="consumerID"), type="pubsub.redis")

    resolve([broker, manifest(Inline("{namespace}"))], "orders-app", {})

    assert [record.getMessage() for record in caplog.records] == [
        "c/a.yaml, document 2: component 'orders': consumerID has {namespace}: "
        "Dapr puts it before every topic then, which is not supported yet"
    ]


def test_without_a_namespace_the_template_says_default() -> None:
    assert value_of(Inline("{namespace}")) == "default.orders-app"


def test_each_uuid_is_one_of_its_own() -> None:
    one, other = value_of(Inline("{uuid} {uuid}")).split()

    assert UUID(one).version == UUID(other).version == 4
    assert one != other


def test_chance_can_be_passed_in() -> None:
    numbers = iter(range(1, 3))

    (component,) = resolve([manifest(Inline("{uuid},{uuid}"))], "a", {}, new_uuid=lambda: UUID(int=next(numbers)))

    assert component.metadata["f"] == f"{UUID(int=1)},{UUID(int=2)}"


def test_a_pod_name_that_is_not_set_is_an_error() -> None:
    assert failure_of(manifest(Inline("a-{podName}"))) == (
        "c/a.yaml, document 2: component 'orders': f refers to {podName}, "
        "but the environment variable POD_NAME is not set"
    )


def test_what_a_template_brings_in_is_not_expanded_again() -> None:
    assert value_of(Inline("{podName}"), {"POD_NAME": "{appID}"}) == "{appID}"


def test_values_from_the_environment_and_from_secrets_are_expanded_too() -> None:
    environment = {"V": "{appID}"}

    by_secret = resolve(
        [env_manifest(), manifest(SecretKeyRef("V", "V"), secret_store="env")], "orders-app", environment
    )

    assert value_of(EnvRef("V"), environment) == "orders-app"
    assert by_secret[1].metadata == {"f": "orders-app"}


# Nothing shows a secret


@pytest.mark.parametrize(
    ("source", "field", "is_secret"),
    [
        (SecretKeyRef("P", "P"), "Host", True),
        (EnvRef("P"), "Host", True),
        (Inline("h"), "Host", False),
        (Inline("p"), "redisPassword", True),
        (Inline("p"), "connectionString", True),
    ],
)
def test_a_field_is_secret_by_where_its_value_comes_from_or_by_its_name(
    source: Source, field: str, is_secret: bool
) -> None:
    component = resolve([env_manifest(), manifest(source, secret_store="env", field=field)], "a", {"P": "p"})[1]

    assert component.secret_fields == (frozenset({field.lower()}) if is_secret else frozenset())


def test_no_secret_is_in_a_repr_or_a_log(write_secrets: WriteSecrets, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    path = write_secrets({"a": SECRET})
    environment = {"P": SECRET}
    manifests = [
        file_manifest(path),
        env_manifest(),
        manifest(SecretKeyRef("a", "a"), secret_store="vault"),
        manifest(SecretKeyRef("P", "P"), secret_store="env"),
        manifest(EnvRef("P")),
        manifest(Inline(SECRET)),
        manifest(SecretKeyRef("P", SECRET[::-1]), secret_store="env", ignore_errors=True),
    ]

    components = resolve(manifests, "orders-app", environment)

    assert [each.metadata["f"] for each in components[2:]] == [SECRET] * 4
    shown = [components, manifests, file_store(path), env_store(environment), file_store(path).names()]
    assert SECRET not in repr(shown) + str(shown) + caplog.text
