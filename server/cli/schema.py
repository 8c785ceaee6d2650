"""`openchat migrate` and `openchat new-epoch`: the state of the database."""

import asyncio

import click

from server.cli.arguments import Command, with_data_dir
from server.core import config, log
from server.core.errors import Fatal
from server.core.terminal import say
from server.db import database
from server.db import migrate as migrations
from server.db.epoch import begin_epoch
from server.processes.embedded.reach import Reached, reached


@click.command(
    "migrate",
    cls=Command,
    examples="""
        openchat migrate --plan     # print the steps, change nothing
        openchat migrate
    """,
)
@click.option("--plan", "is_plan", is_flag=True, help="Only print the steps.")
@with_data_dir
def migrate(data_dir: str | None, *, is_plan: bool) -> None:
    """Migrate the database to this program's schema.

    The server does the same when it starts. An empty database gets the whole schema.
    """
    log.configure("openchat")
    with reached(config.read(data_dir=data_dir), may_create=not is_plan) as servers:
        asyncio.run(_migrate(servers, is_plan=is_plan))


@click.command(
    "new-epoch",
    cls=Command,
    examples="""
        openchat new-epoch          # name the database, change nothing
        openchat new-epoch --yes
    """,
)
@click.option("--yes", "is_meant", is_flag=True, help="Confirm, for the database that the command names.")
@with_data_dir
def new_epoch(data_dir: str | None, *, is_meant: bool) -> None:
    """Make every client start over, after a backup was restored.

    Only needed for restores that the server cannot notice, as docs/operations.md explains.
    """
    log.configure("openchat")
    with reached(config.read(data_dir=data_dir)) as servers:
        asyncio.run(_begin_epoch(servers, is_meant=is_meant))


async def _migrate(servers: Reached, *, is_plan: bool) -> None:
    connection = await database.connect(servers.database_url)
    try:
        steps = await (migrations.plan(connection) if is_plan else migrations.migrate(servers.database_url))
    finally:
        await connection.close()
    for step in steps:
        say(f"{'would apply' if is_plan else 'applied'}  {step}")
    if not steps:
        say("The database is up to date.")


async def _begin_epoch(servers: Reached, *, is_meant: bool) -> None:
    connection = await database.connect(servers.database_url)
    try:
        await migrations.require_current(connection)
        if not is_meant:
            raise Fatal(f"every client of the database {servers.name} would start over. To confirm, use --yes.")
        await begin_epoch(connection)
    finally:
        await connection.close()
    say(f"A new epoch has begun in {servers.name}. Every client starts over, and running workers are replaced.")
