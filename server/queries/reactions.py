"""Reactions, with a row per user and emoji. The statement that changes a row changes the counts in the message, too."""

from functools import partial
from typing import Any, Literal, NamedTuple

from protocol.limits import MAX_EMOJI_OF_USER, MAX_EMOJI_PER_MESSAGE
from server.db.database import Db
from server.db.lock_timeouts import WITHIN_RETRY_LOCK_MS
from server.queries.batched_changes import ChangeFunction, MessageChangeRequest, NotChanged
from server.queries.batches import Query


class ReactionRequest(MessageChangeRequest, frozen=True):
    """A reaction to add or remove.

    A new one is stored as `normal`. A removal finds the spelling `typed`, then `normal`, then one that differs in
    variation selectors. Older versions stored any text, and imports store any name.
    """

    normal: str
    typed: str
    is_added: bool


class ReactionChange(NamedTuple):
    """A reaction as stored, the version of its last change, and the number of users who have it now. `total` is None if
    nothing changed. `is_from_before` tells that some participants joined later and may not see the message.
    """

    emoji: str
    version: int
    total: int | None
    is_from_before: bool


Reason = Literal[
    "changed", "missing", "inactive", "archived", "role", "unwanted", "slow", "too_many_of_user", "too_many_of_message"
]
"""Why a reaction was not changed. Of several reasons, it is the first one in change_reactions()."""


CHANGE = f"SELECT * FROM change_reactions($1, $2, $3, $4, $5) WHERE {WITHIN_RETRY_LOCK_MS}"  # noqa: S608 - as in `SEND`
"""Changes a batch. schema.sql has the function."""
LIMITS = (MAX_EMOJI_PER_MESSAGE, MAX_EMOJI_OF_USER)


def _call(db: Db, requests: str) -> Query:
    return partial(db.fetch, CHANGE, requests)


def _outcome(outcome: str, wait_ms: int | None, *change: Any) -> ReactionChange | NotChanged:  # noqa: ANN401 - columns
    match outcome:
        case "stored":
            return ReactionChange(*change)
        case "unchanged":
            return ReactionChange(*change)._replace(total=None)
        case _:
            return NotChanged(outcome, wait_ms or 0)


FUNCTION: ChangeFunction[ReactionRequest, ReactionChange] = ChangeFunction(_call, *LIMITS, outcome=_outcome)
"""Adds and removes reactions."""
