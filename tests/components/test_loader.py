import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from statecast.components.loader import load, read_manifests
from statecast.components.manifest import Component
from statecast.components.registry import BUILT_IN
from statecast.errors import ComponentError, InvalidRequest

WriteFiles = Callable[[Mapping[str, str]], Path]


def document(name: str, type: str = "state.in-memory", rest: str = "") -> str:
    return f"apiVersion: dapr.io/v1alpha1\nkind: Component\nmetadata: {{name: {name}}}\nspec:\n  type: {type}\n{rest}"


@pytest.fixture
def write_files(tmp_path: Path) -> WriteFiles:
    def write(files: Mapping[str, str]) -> Path:
        folder = tmp_path / "components"
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
        return folder

    return write


def names_of(components: list[Component]) -> list[str]:
    return [component.name for component in components]


# Files


def test_a_folder_is_read_by_file_name_without_its_folders_and_other_files(write_files: WriteFiles) -> None:
    folder = write_files(
        {
            "b.yaml": document("b1") + "---\n" + document("b2"),
            "a.YML": document("a"),
            "c.json": json.dumps(
                {
                    "apiVersion": "dapr.io/v1alpha1",
                    "kind": "Component",
                    "metadata": {"name": "c"},
                    "spec": {"type": "state.in-memory"},
                }
            ),
            "README.md": "{{ not yaml",
            "secrets.json": '{"redisPassword": "x"}',
            "inner/d.yaml": document("d"),
            "folder.yaml/e.yaml": document("e"),
        }
    )

    manifests = read_manifests(folder)

    assert [(each.name, each.origin) for each in manifests] == [
        ("a", f"{folder}/a.YML, document 1"),
        ("b1", f"{folder}/b.yaml, document 1"),
        ("b2", f"{folder}/b.yaml, document 2"),
        ("c", f"{folder}/c.json, document 1"),
    ]


def test_a_file_is_read_whatever_it_is_called(write_files: WriteFiles) -> None:
    folder = write_files({"state.component": document("a")})

    assert names_of(load(folder / "state.component", "orders", {})) == ["a"]


def test_a_byte_order_mark_is_not_content(write_files: WriteFiles) -> None:
    folder = write_files({"a.yaml": "\ufeff" + document("a")})

    assert names_of(load(folder, "orders", {})) == ["a"]


def test_a_path_that_is_not_there_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "none"

    with pytest.raises(ComponentError) as failure:
        load(path, "orders", {})

    assert str(failure.value) == f"cannot read components from {path}: No such file or directory"


@pytest.mark.parametrize("path", ["", "a\0b"])
def test_what_is_no_path_is_an_error(path: str) -> None:
    with pytest.raises(ComponentError, match="read from a folder or a file"):
        load(path, "orders", {})


def test_a_file_that_is_not_utf_8_is_an_error_that_names_it(write_files: WriteFiles) -> None:
    folder = write_files({"a.yaml": document("a")})
    (folder / "b.yaml").write_bytes(b"name: \xff")

    with pytest.raises(ComponentError, match=r"b\.yaml: not UTF-8 text, at byte 6"):
        load(folder, "orders", {})


def test_a_folder_without_components_is_none(write_files: WriteFiles) -> None:
    assert load(write_files({"a.txt": ""}), "orders", {}) == []


# From files to components


def test_secrets_scopes_and_templates_are_applied(write_files: WriteFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_files(
        {
            "a-state.yaml": document(
                "statestore",
                "state.redis",
                "  metadata:\n"
                "  - {name: redisPassword, secretKeyRef: {name: redis, key: redis}}\n"
                "  - {name: redisHost, envRef: REDIS_HOST}\n"
                "  - {name: keyPrefix, value: '{appID}-x'}\n"
                "auth: {secretStore: vault}\nscopes: [orders]\n",
            ),
            "b-state.yaml": document("carts", rest="scopes: [carts]\n"),
            "vault.yaml": document(
                "vault",
                "secretstores.local.file",
                "  metadata: [{name: secretsFile, value: components/secrets.json}]\n",
            ),
            "secrets.json": '{"redis": "hidden"}',
        }
    )
    monkeypatch.chdir(folder.parent)

    vault, state = load("components", "orders", {"REDIS_HOST": "h:1"})

    assert vault.name == "vault"
    assert state == Component(
        name="statestore",
        type="state.redis",
        metadata={"redisPassword": "hidden", "redisHost": "h:1", "keyPrefix": "orders-x"},
        scopes=("orders",),
        secret_fields=frozenset({"redispassword", "redishost"}),
        origin="components/a-state.yaml, document 1",
    )


def test_a_component_of_another_namespace_is_passed_over(write_files: WriteFiles) -> None:
    text = document("a").replace("name: a", "name: a, namespace: test")
    folder = write_files({"a.yaml": text})

    assert load(folder, "orders", {"NAMESPACE": "prod"}) == []
    assert names_of(load(folder, "orders", {"NAMESPACE": "test"})) == ["a"]
    assert names_of(load(folder, "orders", {})) == ["a"]


def test_a_secret_of_a_component_out_of_scope_is_not_looked_for(write_files: WriteFiles) -> None:
    rest = "  metadata: [{name: f, secretKeyRef: {name: none}}]\nscopes: [carts]\n"

    assert load(write_files({"a.yaml": document("a", rest=rest)}), "orders", {}) == []


def test_several_sources_are_read_in_their_order(write_files: WriteFiles) -> None:
    folder = write_files({"a.yaml": document("a"), "b.yaml": document("b")})
    by_hand = Component("hand", "state.in-memory")

    components = load([folder / "b.yaml", by_hand, str(folder / "a.yaml")], "orders", {})

    assert names_of(components) == ["b", "hand", "a"]
    assert components[1] is by_hand


def test_one_component_made_by_hand_is_a_source() -> None:
    by_hand = Component("hand", "state.in-memory")

    assert load(by_hand, "orders", {}) == [by_hand]


def test_a_name_given_twice_is_an_error_that_names_both_places(write_files: WriteFiles) -> None:
    folder = write_files({"a.yaml": document("same"), "b.yaml": document("same", "pubsub.in-memory")})

    with pytest.raises(ComponentError) as failure:
        load(folder, "orders", {})

    assert f"{folder}/b.yaml, document 1: component 'same'" in str(failure.value)
    assert f"{folder}/a.yaml, document 1: component 'same'" in str(failure.value)


def test_an_unknown_type_is_an_error_that_names_file_and_document(write_files: WriteFiles) -> None:
    folder = write_files({"a.yaml": document("a", "state.memory")})

    with pytest.raises(ComponentError) as failure:
        load(folder, "orders", {})

    expected = (
        f"{folder}/a.yaml, document 1: component 'a': unknown type 'state.memory'; did you mean 'state.in-memory'?"
    )
    assert str(failure.value).startswith(expected)


def test_an_unknown_type_that_ignores_errors_is_left_out_with_a_warning(
    write_files: WriteFiles, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_files({"a.yaml": document("a", "bindings.cron", "  ignoreErrors: true\n"), "b.yaml": document("b")})

    assert names_of(load(folder, "orders", {})) == ["b"]
    assert "unknown type 'bindings.cron'" in caplog.text


def test_a_registry_of_ones_own_says_what_is_known(write_files: WriteFiles) -> None:
    folder = write_files({"a.yaml": document("a", "state.mine")})

    components = load(folder, "orders", {}, registry=BUILT_IN.register("state.mine", "no.such:Module"))

    assert names_of(components) == ["a"]


def test_a_good_folder_is_read_without_a_word(write_files: WriteFiles, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    load(write_files({"a.yaml": document("a"), "b.yaml": "kind: Subscription\n"}), "orders", {})

    assert not caplog.records


@pytest.mark.parametrize("app_id", ["", "a.b"])
def test_an_app_id_that_cannot_be_is_refused_before_anything_is_read(app_id: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="parameter app-id cannot"):
        load(tmp_path / "none", app_id, {})
