"""Every column of the database, what writes it and what reads it: docs/columns.md, in which nothing may be dead."""

import importlib
import pkgutil
import re
from collections import defaultdict
from types import ModuleType
from typing import NamedTuple

from server import queries
from server.db import migrate

WAITING = {
    "attachment": "uploads",
    "verification": "verified addresses, and passwords that are reset by mail",
    "account.access_token": "other ways to log in",
    "account.refresh_token": "other ways to log in",
    "account.id_token": "other ways to log in",
    "account.access_token_expires_at": "other ways to log in",
    "account.refresh_token_expires_at": "other ways to log in",
    "account.scope": "other ways to log in",
    "user.email_verified": "verified addresses",
    "message.token_count": "assistants",
    "message.model": "assistants",
    "database_epoch": "server/db/epoch.py, which keeps it",
}
"""Tables and columns that nothing uses yet, or that no query of server/queries does, and what for."""

FOR_READERS = {
    "conversation.updated_at", "message.updated_at", "message.edited_by", "message.status",
    "user_relationship.updated_at",
    "account.updated_at", "session.updated_at", "user.updated_at", "user.is_online", "conversation.direct_low",
    "conversation_participant.id", "conversation_participant.notifications_enabled", "account.id", "session.created_at",
    "message_reaction.created_at", "message_edit.message_id",
}  # fmt: skip
"""What is kept for those who read the database directly: grant_reader() in schema.sql shows most of it to them."""

GRANT = re.compile(r"GRANT SELECT (?:\(([^)]*)\) )?ON ([^']*?) TO %I")
"""What grant_reader() grants: some columns of a table, or tables and views whole."""

SHOWN = 4
INSERT = re.compile(r'INSERT INTO\s+("?\w+"?)\s*(?:AS \w+\s*)?\(([^)]*)\)', re.IGNORECASE)
UPDATE = re.compile(
    r'(?<!FOR NO KEY )\bUPDATE\s+("?\w+"?)(?:\s+(?!SET\b)\w+)?\s+SET\b'
    r"(.*?)(?=\bFROM\b|\bWHERE\b|\bRETURNING\b|$)",
    re.IGNORECASE | re.DOTALL,
)
UPSERT = re.compile(r"DO UPDATE SET\b(.*?)(?=\bWHERE\b|\bRETURNING\b|$)", re.IGNORECASE | re.DOTALL)
WORD = re.compile(r"\w+")
TARGET = re.compile(r"(?:^|,)\s*(\w+)\s*=", re.MULTILINE)


def statements() -> dict[str, str]:
    """Return all statements by name, and the functions, policies and views of the schema."""
    found: dict[str, str] = {}
    for info in pkgutil.iter_modules(queries.__path__):
        module: ModuleType = importlib.import_module(f"server.queries.{info.name}")
        for name, value in vars(module).items():
            texts = value if isinstance(value, tuple) else (value,)
            for number, text in enumerate(texts):
                if name.isupper() and isinstance(text, str) and re.search(r"\b(SELECT|INSERT|UPDATE|DELETE)\b", text):
                    found[f"{info.name}.{name}{number or ''}"] = text
    text = re.sub(r"--.*", "", (migrate.ROOT / "schema.sql").read_text())
    for part in re.split(r"\n(?=CREATE (?:FUNCTION|POLICY|VIEW))", text)[1:]:
        if kind := re.match(r"CREATE (?:FUNCTION|POLICY|VIEW) (\w+)", part):
            # To its own end: tables may follow.
            found[f"schema.{kind[1]}"] = part.split("\n$$;" if "$$" in part.split(";\n")[0] else ";\n")[0]
    return found


def written(text: str) -> dict[str, set[str]]:
    """Return which columns of which tables a statement writes."""
    found: dict[str, set[str]] = defaultdict(set)
    for table, columns in INSERT.findall(text):
        found[table.strip('"')] |= {column.strip() for column in columns.split(",")}
        for targets in UPSERT.findall(text):
            found[table.strip('"')] |= set(TARGET.findall(targets))
    for table, targets in UPDATE.findall(text):
        found[table.strip('"')] |= set(TARGET.findall(targets))
    return found


def without_targets(text: str) -> str:
    """Return a statement without the places where it says what it writes."""
    text = INSERT.sub(r"\1", text)
    return re.sub(r"(?m)(^\s*|, |SET )\w+ = ", r"\1", text)


class Column(NamedTuple):
    """A column, and the names of the statements that write and read it; `note` is for one without."""

    table: str
    name: str
    writers: list[str]
    readers: list[str]
    note: str = ""


def columns() -> list[Column]:
    """Return all columns, in the order of schema.sql."""
    texts = statements()
    writers: dict[str, set[str]] = defaultdict(set)
    for name, text in texts.items():
        for table, targets in written(text).items():
            for column in targets:
                writers[f"{table}.{column}"].add(name)
    words = {name: (set(WORD.findall(one)), set(WORD.findall(without_targets(one)))) for name, one in texts.items()}
    found = []
    text = re.sub(r"--.*", "", (migrate.ROOT / "schema.sql").read_text())
    for table, inside in re.findall(r'CREATE TABLE "?(\w+)"? \((.*?)\n\)', text, re.DOTALL):
        for column, definition in re.findall(r"^    (\w+) ((?:[a-z]+\b.*))$", inside, re.MULTILINE):
            if column in {"CONSTRAINT", "CHECK"}:
                continue
            place = f"{table}.{column}"
            made = [*writers[place], *(["its default"] if "DEFAULT" in definition else [])]
            if table == "audit_entry" and not made:
                made = ["audit.RECORD"]  # a whole row at once
            readers = [name for name, (said, read) in words.items() if table in said and column in read]
            note = WAITING.get(place, WAITING.get(table, ""))
            if not note and not readers and place in FOR_READERS:
                readers = ["whoever reads the database directly"]
            found.append(Column(table, column, sorted(made), sorted(readers), note))
    return found


def granted() -> dict[str, list[str]]:
    """Return the tables and views that grant_reader() grants, with their columns; none for a whole one."""
    text = statements()["schema.grant_reader"]
    found: dict[str, list[str]] = {}
    for names, tables in GRANT.findall(re.sub(r"\s+", " ", text)):
        for table in tables.split(","):
            found[table.strip().strip('"')] = [name.strip() for name in names.split(",") if name.strip()]
    return found


def document() -> str:
    """Return the list in Markdown."""
    lines = [
        "# The columns",
        "",
        "<!-- Generated by `make docs` from schema.sql and server/queries/. Do not edit. -->",
        "",
        "What writes and what reads each column of [schema.sql](../schema.sql): statements of `server/queries/`,",
        "by file and name, and forms and rules of the schema itself (`schema.…`).",
    ]
    table = ""
    for column in columns():
        if column.table != table:
            table = column.table
            lines += ["", f"## {table}", "", "| column | written by | read by |", "| --- | --- | --- |"]
        if column.note:
            lines.append(f"| `{column.name}` | waits for | {column.note} |")
        else:
            lines.append(f"| `{column.name}` | {_some(column.writers)} | {_some(column.readers)} |")
    lines += [
        "",
        "## What readers of the database read",
        "",
        "Columns that `grant_reader` grants ([administration.md](administration.md#reading-the-database-directly)), of",
        "the rows that the policies show. A query that names another column or table is refused; so is `SELECT *` of a",
        "table that is not granted whole.",
        "",
        "| table or view | columns |",
        "| --- | --- |",
    ]
    lines += [f"| `{table}` | {', '.join(f'`{one}`' for one in some) or 'all'} |" for table, some in granted().items()]
    return "\n".join(lines) + "\n"


def _some(names: list[str]) -> str:
    """Return the first names and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
