"""Statements that lock one conversation until the transaction ends. `server/queries/__init__.py` defines the order of
locks.
"""

# PostgreSQL locks only the rows that WHERE selects, so refused users neither wait for the row nor hold it. A row that
# changed meanwhile is evaluated again, but `conversation_participant` is read as of the start of the statement.
HAS_PART = """EXISTS (
    SELECT FROM conversation_participant p
    WHERE p.conversation_id = c.id AND p.user_id = $2 AND p.status = {status} OFFSET 0
)"""
"""Whether the user $2 is a participant with this status in the conversation `c`, checked before the row of `c` is
locked.
"""


def _locking(what: str, *conditions: str) -> str:
    where = " AND ".join(("c.id = $1", *conditions))
    return f"SELECT {what} FROM conversation c WHERE {where} FOR NO KEY UPDATE"  # noqa: S608 - constants are put in


LOCK_ROW = _locking("true")
"""Locks a conversation, deleted or not."""
LOCK = _locking("conversation_json(c)", "NOT c.is_deleted")
"""Locks a conversation, and returns it."""
LOCK_AS = _locking("conversation_json(c)", "NOT c.is_deleted", HAS_PART.format(status="$3"))
"""The same as `LOCK` for a participant $2 with the status $3."""
LOCK_PART = _locking("true", "NOT c.is_deleted", HAS_PART.format(status="'active'"))
"""Locks a conversation for an active participant $2."""


def _with_user(lock: str, user: str) -> str:
    """Return a statement that locks a user after a conversation. It also returns whether the account is active."""
    return f"""
WITH c AS MATERIALIZED ({lock})
SELECT c.conversation_json, u.is_active AND NOT u.is_deleted FROM c JOIN "user" u ON u.id = {user}
FOR NO KEY UPDATE OF u
"""  # noqa: S608 - statements of this file are put in


LOCK_AS_WITH_USER = _with_user(LOCK_AS, "$2")
"""The same as `LOCK_AS`, and then lock the user $2."""
