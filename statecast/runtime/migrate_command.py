"""`statecast migrate`: bring the schemas of state stores up to date ahead of the apps that use them."""

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

import click

from statecast.clock import SystemClock
from statecast.components.loader import load
from statecast.components.manifest import Component, describe
from statecast.components.registry import STATE_CATEGORY, installed
from statecast.components.state.migratable import Migratable
from statecast.errors import ComponentError, InvalidRequest, StatecastError


@click.command()
@click.option("--resources-path", type=click.Path(exists=True, path_type=Path), required=True, help="Component YAML.")
@click.option("--app-id", required=True, help="The app whose stores they are.")
@click.option("--store", "name", help="One state component's name; all of them by default.")
@click.option("--print", "prints", is_flag=True, help="Change nothing, print the pending statements as SQL.")
def migrate(resources_path: Path, app_id: str, name: str | None, prints: bool) -> None:
    """Bring the schemas of state stores up to date, so that apps can do without the right to change them.

    An app whose role may create tables does this by itself when it starts. What is printed is one transaction for
    each store, to be run by whoever has the rights: statecast migrate --print ... | psql ...
    """
    stores = [component for component in load(resources_path, app_id, os.environ) if _is_state(component)]
    for component in _chosen(stores, name):
        try:
            asyncio.run(_migrate(component, app_id, prints=prints))
        except StatecastError as error:
            raise ComponentError(f"{describe(component)}: cannot be migrated: {error}") from error


async def _migrate(component: Component, app_id: str, *, prints: bool) -> None:
    store = installed().state_store(component, app_id=app_id, clock=SystemClock())
    if not isinstance(store, Migratable):
        click.echo(f"-- {component.name}: {component.type} is migrated when it is opened")
        return
    pending = await store.pending_migrations()
    if not pending:
        click.echo(f"-- {component.name}: is up to date")
    elif prints:
        click.echo(as_script(component, pending))
    else:
        await store.migrate()
        click.echo(f"-- {component.name}: is up to date now, after {len(pending)} statements")


def as_script(component: Component, statements: Sequence[str]) -> str:
    """Give the statements as a script for psql that is run as a whole or not at all."""
    lines = [f"-- {describe(component)}", r"\set ON_ERROR_STOP on", "begin;"]
    return "\n".join([*lines, *(f"{statement.strip()};" for statement in statements), "commit;"])


def _is_state(component: Component) -> bool:
    return component.type.lower().startswith(STATE_CATEGORY)


def _chosen(stores: Sequence[Component], name: str | None) -> list[Component]:
    chosen = [component for component in stores if name in (None, component.name)]
    if not chosen and name is not None:
        loaded = ", ".join(sorted(component.name for component in stores)) or "none"
        raise InvalidRequest(f"state store {name!r} is not loaded; loaded are: {loaded}")
    return chosen
