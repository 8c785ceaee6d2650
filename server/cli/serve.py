"""`openchat run`: the server."""

import click

from server.cli.arguments import Command, with_server_options
from server.core import config, log
from server.processes.supervisor import Supervisor


@click.command(
    "run",
    cls=Command,
    examples="""
        openchat                            # on http://127.0.0.1:8000
        openchat --port 9000 --workers 2
        openchat run --data-dir /srv/chat
        OPENCHAT_WRITE_RATE=20 openchat     # `openchat settings` lists all of these
    """,
)
@with_server_options
def run(host: str | None, port: str | None, workers: str | None, data_dir: str | None) -> None:
    """Start the server. `openchat` alone does the same.

    Without DATABASE_URL and REDIS_URL the server starts a PostgreSQL and a Valkey of its own.
    """
    log.configure("openchat")
    settings = config.read(host=host, port=port, workers=workers, data_dir=data_dir)
    Supervisor(settings).run()
