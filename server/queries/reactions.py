"""Reactions, with a row per user and emoji. The statement that changes a row changes the counts in the message, too."""

from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple

import msgspec
from asyncpg import Record

from protocol.ids import ConversationId, MessageId, UserId
from protocol.limits import MAX_EMOJI_OF_USER, MAX_EMOJI_PER_MESSAGE
from server.db.database import Db
from server.db.lock_timeouts import WITHIN_LOCK_MS
from server.fairness.lanes import HELD, Held
from server.queries import batches


class ReactionRequest(NamedTuple):
    """A reaction to add or remove.

    A new one is stored as `normal`. A removal finds the spelling `typed`, then `normal`, then one that differs in
    variation selectors. Older versions stored any text, and imports store any name.
    """

    conversation_id: ConversationId
    message_id: MessageId
    user_id: UserId
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
"""Why a reaction was not changed. Of several reasons, it is the first one in change_reactions().

Another attempt may succeed for `changed`. The user joined while the statement ran, or the batch has another request of
the user about the message.
"""


class NotChanged(NamedTuple):
    """A reaction that was not changed. `wait_ms` is the time until the user may send in slow mode, in milliseconds."""

    reason: Reason
    wait_ms: int = 0


CHANGE = f"SELECT * FROM change_reactions($1, $2, $3, $4, $5) WHERE {WITHIN_LOCK_MS}"  # noqa: S608 - as in `SEND`
"""Changes a batch. schema.sql has the function."""
LIMITS = (MAX_EMOJI_PER_MESSAGE, MAX_EMOJI_OF_USER)


async def change(db: Db, batch: Sequence[ReactionRequest]) -> list[ReactionChange | NotChanged | Held]:
    """Add and remove reactions, and return the outcomes in the order of the batch. The outcome is `HELD` if the
    conversations stay locked for `LOCK_MS`. Raises what `batches.waiting` raises.
    """
    rows = await batches.waiting(partial(db.fetch, CHANGE, _encoded(batch)), *LIMITS, count=len(batch))
    return _outcomes(batch, rows)


async def change_free(db: Db, batch: Sequence[ReactionRequest]) -> list[ReactionChange | NotChanged | Held]:
    """Do the same as `change`, but skip locked conversations, whose outcome is `HELD`. So is that of a single reaction
    that would wait for another row. Raises what `batches.passing` raises.
    """
    rows = await batches.passing(partial(db.fetch, CHANGE, _encoded(batch)), *LIMITS, count=len(batch))
    return [HELD] if rows is None else _outcomes(batch, rows)


def _outcomes(batch: Sequence[ReactionRequest], rows: Sequence[Record]) -> list[ReactionChange | NotChanged | Held]:
    outcomes: list[ReactionChange | NotChanged | Held] = [NotChanged("changed")] * len(batch)
    for place, outcome, wait_ms, emoji, version, total, is_from_before in rows:
        if outcome in {"stored", "unchanged"}:
            outcomes[place] = ReactionChange(emoji, version, total if outcome == "stored" else None, is_from_before)
        else:
            outcomes[place] = HELD if outcome == "held" else NotChanged(outcome, wait_ms or 0)
    return outcomes


def _encoded(batch: Sequence[ReactionRequest]) -> str:
    """Return the reactions as JSON with the fields of the type `reaction_request`. Leaves out further ones of a user
    about a message, because each depends on the one before.
    """
    first: dict[tuple[UserId, MessageId], tuple[int, ReactionRequest]] = {}
    for place, item in enumerate(batch):
        first.setdefault((item.user_id, item.message_id), (place, item))
    return msgspec.json.encode([{"place": place} | item._asdict() for place, item in first.values()]).decode()
