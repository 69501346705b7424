"""`statecast servers up|down|status`: real servers for development, which go on running after the command."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TypeVar

import click

from statecast.errors import StatecastError
from statecast.runtime.detached_servers import Condition, DetachedServer, DetachedServers
from statecast.runtime.server import Server, ServerKind, component_metadata

_Command = TypeVar("_Command", bound=Callable[..., None])


@click.group()
def servers() -> None:
    """Run PostgreSQL, Redis and Kafka for development, in Docker or as local processes."""


def _kinds_and_json(command: _Command) -> _Command:
    kinds = click.argument("kinds", nargs=-1, type=click.Choice([kind.value for kind in ServerKind]))
    return kinds(click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")(command))


@servers.command()
@_kinds_and_json
def up(kinds: Sequence[str], as_json: bool) -> None:
    """Start the servers named, or all, that do not run yet, and print their addresses.

    They go on running, and keep their data, until `down`. The usual port is taken if it is free.
    """
    with _errors_told():
        started = []
        for known in DetachedServers().up(_chosen(kinds)):
            started.append(known)
            if not as_json:
                click.echo(f"# {_line(known.server)}\n{component_hint(known.server)}\n")
    if as_json:
        click.echo(_as_json([(known, Condition.RUNNING) for known in started]))


@servers.command()
@_kinds_and_json
def down(kinds: Sequence[str], as_json: bool) -> None:
    """End the servers named, or all, and remove their data."""
    with _errors_told():
        ended = DetachedServers().down(_chosen(kinds))
    if as_json:
        click.echo(_as_json([(known, Condition.ENDED) for known in ended]))
        return
    for known in ended:
        click.echo(f"ended {_line(known.server)}")
    if not ended:
        click.echo("nothing was running")


@servers.command()
@_kinds_and_json
def status(kinds: Sequence[str], as_json: bool) -> None:
    """Print which servers `up` has started, and whether they answer."""
    with _errors_told():
        chosen = _chosen(kinds)
        conditions = [(known, known.condition()) for known in DetachedServers().known() if known.server.kind in chosen]
    if as_json:
        click.echo(_as_json(conditions))
        return
    for known, condition in conditions:
        click.echo(f"{_line(known.server)}: {condition}")
    if not conditions:
        click.echo("none was started")


def component_hint(server: Server) -> str:
    """Return the YAML of the components that use the server: one document for each."""
    metadata = component_metadata(server.kind, server.address)
    match server.kind:
        case ServerKind.POSTGRESQL:
            return _component("statestore", "state.postgresql", "v2", metadata)
        case ServerKind.REDIS:
            store = _component("statestore", "state.redis", "v1", metadata)
            return f"{store}\n---\n{_component('pubsub', 'pubsub.redis', 'v1', metadata)}"
        case ServerKind.KAFKA:
            return _component("pubsub", "pubsub.kafka", "v1", metadata)


def _component(name: str, type_: str, version: str, metadata: dict[str, str]) -> str:
    head = ["apiVersion: dapr.io/v1alpha1", "kind: Component", f"metadata: {{name: {name}}}"]
    fields = [f'  - {{name: {field}, value: "{value}"}}' for field, value in metadata.items()]
    return "\n".join([*head, "spec:", f"  type: {type_}", f"  version: {version}", "  metadata:", *fields])


def _chosen(kinds: Sequence[str]) -> list[ServerKind]:
    return [ServerKind(kind) for kind in kinds] or list(ServerKind)


def _line(server: Server) -> str:
    return f"{server.kind} {server.version} at {server.address} ({server.origin})"


def _as_json(conditions: Sequence[tuple[DetachedServer, Condition]]) -> str:
    return json.dumps([asdict(known.server) | {"condition": condition} for known, condition in conditions], indent=2)


@contextmanager
def _errors_told() -> Iterator[None]:
    try:
        yield
    except StatecastError as error:
        raise click.ClickException(str(error)) from error
