"""Statements that lock one conversation until the transaction ends. The package says in which order to lock."""

# PostgreSQL locks only the rows that WHERE selects: others neither wait for the row nor hold it. A row that changed
# meanwhile is selected anew, but `conversation_participant` is read as it was when the statement began.
HAS_PART = """EXISTS (
    SELECT FROM conversation_participant p
    WHERE p.conversation_id = c.id AND p.user_id = $2 AND p.status = {status} OFFSET 0
)"""
"""Whether the user $2 has a part with this status in the conversation `c`, asked before the row of `c` is locked."""


def _locking(what: str, *conditions: str) -> str:
    where = " AND ".join(("c.id = $1", *conditions))
    return f"SELECT {what} FROM conversation c WHERE {where} FOR NO KEY UPDATE"  # noqa: S608 - constants are put in


LOCK_ROW = _locking("true")
"""Locks a conversation, also a deleted one."""
LOCK = _locking("conversation_json(c)", "NOT c.is_deleted")
"""Locks a conversation and returns it."""
LOCK_AS = _locking("conversation_json(c)", "NOT c.is_deleted", HAS_PART.format(status="$3"))
"""Does what `LOCK` does, if the user $2 has a part with the status $3."""
LOCK_PART = _locking("true", "NOT c.is_deleted", HAS_PART.format(status="'active'"))
"""Locks a conversation, if the user $2 takes part."""
