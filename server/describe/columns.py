"""Every column of the database with the statements that write and read it, for docs/columns.md. A test finds unused
ones.

PostgreSQL itself reports the columns of a statement, and server/describe/query_tree.py reads its parse trees.
"""

import asyncio
import importlib
import inspect
import pkgutil
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import asyncpg

from server import queries
from server.db import epoch, migrate
from server.describe import query_tree
from server.describe.query_tree import Use
from server.processes.embedded.folder import DataFolder
from server.processes.embedded.postgres import Postgres

LOGINS = "accounts that people and companies can rely on (issue 19)"
SYNC = "local-first sync (issue 22)"
WAITING = {
    "attachment": "files (issue 20)",
    "verification": LOGINS,
    "account.id": LOGINS,
    "account.access_token": LOGINS,
    "account.refresh_token": LOGINS,
    "account.id_token": LOGINS,
    "account.access_token_expires_at": LOGINS,
    "account.refresh_token_expires_at": LOGINS,
    "account.scope": LOGINS,
    "account.updated_at": LOGINS,
    "user.email_verified": LOGINS,
    "user.updated_at": SYNC,
    "conversation.updated_at": SYNC,
    "conversation_participant.notifications_enabled": f"{SYNC}; kept equal to `notification_level <> 'none'`",
    "message.token_count": "assistants (issue 21)",
    "message.model": "assistants (issue 21)",
    "database_epoch.is_only": "nothing: its constraint allows one row",
}
"""Columns or whole tables of the specification that no statement reads yet, and the feature that will."""
WAITING_VALUES = {
    "conversation.type": {"assistant": "assistants (issue 21)"},
    "message.status": {
        "sending": "assistants (issue 21): an answer that is still streamed",
        "failed": "assistants (issue 21): an answer that broke off",
        "delivered": "nothing: follows from `delivered_version` of each participant",
        "read": "nothing: follows from `last_read_version` of each participant",
    },
    "attachment.storage_provider": dict.fromkeys(("local", "s3", "gcs", "azure", "cloudinary"), "files (issue 20)"),
    "attachment.scan_result": dict.fromkeys(("clean", "infected", "suspicious", "pending"), "files (issue 20)"),
    "attachment.processing_status": dict.fromkeys(("pending", "processing", "completed", "failed"), "files (issue 20)"),
}
"""Values in the specification's lists that no statement writes yet."""

GRANT = re.compile(r"GRANT SELECT (?:\(([^)]*)\) )?ON ([^']*?) TO %I")
"""The grants of grant_reader(): some columns of a table, or whole tables and views."""

SHOWN = 4
PRINT = "SET debug_print_parse = on; SET debug_pretty_print = off; SET client_min_messages = log"
FRAGMENTS = (asyncpg.PostgresSyntaxError, asyncpg.UndefinedTableError, asyncpg.UndefinedColumnError,
             asyncpg.IndeterminateDatatypeError)  # fmt: skip
"""PostgreSQL's errors about incomplete statements."""
TABLES = """
SELECT c.oid, c.relname, c.reltype, a.attnum, a.attname, pg_get_expr(d.adbin, d.adrelid) AS made
FROM pg_class c
JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'r' AND c.relname <> 'schema_migration'
ORDER BY c.oid, a.attnum
"""
RULES = """
SELECT p.proname AS name, 0 AS about, p.prosqlbody::text AS tree FROM pg_proc p
WHERE p.pronamespace = 'public'::regnamespace AND p.prosqlbody IS NOT NULL
UNION ALL
SELECT c.relname, 0, r.ev_action::text FROM pg_rewrite r JOIN pg_class c ON c.oid = r.ev_class
WHERE c.relnamespace = 'public'::regnamespace
UNION ALL SELECT p.polname, p.polrelid, p.polqual::text FROM pg_policy p
"""
"""SQL functions, views and policies, which PostgreSQL stores as trees."""
FUNCTIONS = """
SELECT p.proname, p.prosrc, pg_get_function_identity_arguments(p.oid) AS arguments FROM pg_proc p
WHERE p.pronamespace = 'public'::regnamespace AND p.prolang = (SELECT oid FROM pg_language WHERE lanname = 'plpgsql')
ORDER BY 1
"""
COPY = "CREATE FUNCTION pg_temp.{name}({arguments}) RETURNS void LANGUAGE sql BEGIN ATOMIC {body}; END"
"""A statement of a PL/pgSQL function, with the function's variables as parameters."""
DECLARED = re.compile(r"^ *(\w+) (?:CONSTANT )?(?!record)(\w+(?:\[\])?)(?: :=.*)?;", re.MULTILINE)


def statements() -> dict[str, str]:
    """Return all constants that may be statements, by name."""
    found: dict[str, str] = {}
    names = [f"server.queries.{info.name}" for info in pkgutil.iter_modules(queries.__path__)]
    for module in map(importlib.import_module, [*names, epoch.__name__]):
        source = inspect.getsource(module)
        for name, value in vars(module).items():
            if not re.search(rf"^{name}\b.*=", source, re.MULTILINE):
                continue  # imported from another module
            texts = value if isinstance(value, tuple) else (value,)
            for number, text in enumerate(texts):
                if name.isupper() and isinstance(text, str) and re.search(r"\b(SELECT|INSERT|UPDATE|DELETE)\b", text):
                    found[f"{module.__name__.split('.')[-1]}.{name}{number or ''}"] = text
    return found


async def uses(db: "asyncpg.Connection[asyncpg.Record]") -> dict[str, Use]:
    """Return the columns that each statement, function, policy and view uses, in a database with the schema."""
    rows = await db.fetch(TABLES)
    tables: query_tree.Tables = {}
    for row in rows:
        tables.setdefault(row["oid"], (row["relname"], {}))[1][row["attnum"]] = row["attname"]
    row_types = {row["reltype"]: row["oid"] for row in rows}
    found: dict[str, Use] = defaultdict(lambda: Use(tables, row_types))
    for name, tree in await _trees(db):
        found[name].query(tree)
    for name, about, text in await db.fetch(RULES):
        if about:
            found[f"schema.{name}"].condition(query_tree.parse(text), about)
        else:
            for tree in _queries(query_tree.parse(text)):
                found[f"schema.{name}"].query(tree)
    for name, source, arguments in await db.fetch(FUNCTIONS):
        for statement in _statements(source, {table for table, _ in tables.values()}):
            declared = ", ".join(f"{one} {kind}" for one, kind in DECLARED.findall(source.split("BEGIN")[0]))
            every = ", ".join(filter(None, (arguments, declared)))
            async with db.transaction():
                await db.execute(COPY.format(name=name, arguments=every, body=statement))
                text = await db.fetchval(
                    "SELECT prosqlbody::text FROM pg_proc WHERE proname = $1 AND pronamespace = pg_my_temp_schema()",
                    name,
                )
                await db.execute(f"DROP FUNCTION pg_temp.{name}")
            for tree in _queries(query_tree.parse(text)):
                found[f"schema.{name}"].query(tree)
    return dict(found)


async def _trees(db: "asyncpg.Connection[asyncpg.Record]") -> list[tuple[str, Any]]:
    """Return the trees of the statements in server/queries/."""
    printed: list[str] = []

    def note(_: object, message: asyncpg.PostgresLogMessage) -> None:
        if message.message == "parse tree:" and ":commandType 6 " not in (message.detail or "")[:50]:  # utilities
            printed.append(message.detail or "")

    found = []
    db.add_log_listener(note)
    await db.execute(PRINT)
    for name, text in statements().items():
        printed.clear()
        try:
            await db.prepare(text)
        except FRAGMENTS:
            continue
        await db.execute(PRINT)  # the listener is called in the next turn of the loop
        found += [(name, query_tree.parse(one)) for one in printed]
    await db.execute("RESET debug_print_parse; RESET client_min_messages")
    db.remove_log_listener(note)
    return found


def _queries(tree: Any) -> Iterator[Any]:  # noqa: ANN401 - a node tree
    """Yield the queries of a tree, which may be a list of them in functions."""
    if isinstance(tree, dict):
        yield tree
    for one in tree if isinstance(tree, list) else ():
        yield from _queries(one)


def _statements(source: str, tables: set[str]) -> Iterator[str]:
    """Yield the queries of a PL/pgSQL function that use one of these tables."""
    source = re.sub(r"--.*|(?<!INSERT )\bINTO \w+(, \w+)*", "", source).replace("PERFORM", "SELECT")
    place = 0
    while start := re.compile(r"\b(WITH|SELECT|INSERT|UPDATE|DELETE)\b").search(source, place):
        place, depth = start.start(), 0
        while depth >= 0 and source[place] != ";":
            depth += {"(": 1, ")": -1}.get(source[place], 0)
            place += depth >= 0
        text = source[start.start() : place]
        if set(re.findall(r'\b(?:FROM|JOIN|INTO|UPDATE) (?:public\.)?"?(\w+)', text)) & tables:
            yield text


class Column(NamedTuple):
    """A column, and the names of the statements that write and read it. `note` is for unused ones."""

    table: str
    name: str
    writers: list[str]
    readers: list[str]
    note: str = ""


async def columns(db: "asyncpg.Connection[asyncpg.Record]", used: dict[str, Use]) -> list[Column]:
    """Return all columns in the order of schema.sql, with the statements of `uses`."""
    writers: dict[str, set[str]] = defaultdict(set)
    readers: dict[str, set[str]] = defaultdict(set)
    for name, use in used.items():
        for place in use.written:
            writers[place].add(name)
        for place in use.read:
            readers[place].add(name)
    shown = granted()
    found = []
    for row in await db.fetch(TABLES):
        table, name = row["relname"], row["attname"]
        place = f"{table}.{name}"
        made = [*sorted(writers[place]), *([] if row["made"] is None else ["its default"])]
        read = sorted(readers[place])
        if table in shown and (not shown[table] or name in shown[table]):
            read.append("readers of the database")
        found.append(Column(table, name, made, read, WAITING.get(place, WAITING.get(table, ""))))
    return found


def granted() -> dict[str, list[str]]:
    """Return the tables and views of grant_reader(), with their columns, or with none for whole ones."""
    text = (migrate.ROOT / "schema.sql").read_text()
    found: dict[str, list[str]] = {}
    for names, tables in GRANT.findall(re.sub(r"\s+", " ", text)):
        for table in tables.split(","):
            found[table.strip().strip('"')] = [name.strip() for name in names.split(",") if name.strip()]
    return found


def document() -> str:
    """Return the list in Markdown, from a temporary PostgreSQL."""
    with tempfile.TemporaryDirectory(prefix="openchat-columns-") as path:
        folder = DataFolder(Path(path))
        postgres = Postgres(folder, max_connections=5, options={"fsync": "off"})
        try:
            postgres.start()
            return markdown(asyncio.run(_columns(postgres.url("postgres"))))
        finally:
            postgres.stop()
            folder.release()


async def _columns(url: str) -> list[Column]:
    await migrate.migrate(url)
    db = await asyncpg.connect(url)
    try:
        return await columns(db, await uses(db))
    finally:
        await db.close()


def markdown(found: list[Column]) -> str:
    """Return the list in Markdown."""
    lines = [
        "# The columns",
        "",
        "<!-- Generated by `make docs` from schema.sql and server/queries/. Do not edit. -->",
        "",
        "The statements that write and read each column of [schema.sql](../schema.sql): constants of",
        "`server/queries/`, and functions, views and policies of the schema itself (`schema.…`). PostgreSQL's own",
        "parse trees are the source ([0072](decisions/0072-postgresql-says-what-is-used.md)). The last section has the",
        "columns for readers of the database.",
    ]
    table = ""
    for column in found:
        if column.table != table:
            table = column.table
            lines += ["", f"## {table}", "", "| column | written by | read by |", "| --- | --- | --- |"]
        if column.note:
            lines.append(f"| `{column.name}` | waits for | {column.note} |")
        else:
            lines.append(f"| `{column.name}` | {_some(column.writers)} | {_some(column.readers)} |")
    lines += [
        "",
        "## Unused values",
        "",
        "Values that the schema allows and that no statement writes.",
        "",
        "| column | value | waits for |",
        "| --- | --- | --- |",
        *(
            f"| `{place}` | `{value}` | {reason} |"
            for place, values in WAITING_VALUES.items()
            for value, reason in values.items()
        ),
        "",
        "## Columns for readers of the database",
        "",
        "Columns that `grant_reader` grants ([administration.md](administration.md#reading-the-database-directly)).",
        "The policies limit the rows. PostgreSQL refuses a query of other columns or tables, and `SELECT *` from a",
        "table that is only granted in part.",
        "",
        "| table or view | columns |",
        "| --- | --- |",
    ]
    lines += [f"| `{table}` | {', '.join(f'`{one}`' for one in some) or 'all'} |" for table, some in granted().items()]
    return "\n".join(lines) + "\n"


def _some(names: list[str]) -> str:
    """Return the first names, and the number of others."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
