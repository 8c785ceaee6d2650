"""Joins of conversations, in statements of many users."""

from functools import partial
from typing import Any, Literal, NamedTuple
from uuid import UUID

from protocol.ids import UserId
from protocol.limits import MAX_MEMBERSHIPS, MAX_SHARED_PARTICIPANTS
from protocol.values import Message
from server.db.database import Db
from server.db.lock_timeouts import WITHIN_RETRY_LOCK_MS
from server.db.rows import Reader
from server.queries.batched_changes import ChangeFunction, ChangeRequest, NotChanged
from server.queries.batches import Query
from server.queries.participants import ParticipantChange, decoded_change

_message_decoder = Reader(Message)


class JoinRequest(ChangeRequest, frozen=True):
    """A user who joins a conversation. With `invite_code`, the conversation must have that code."""

    user_id: UserId
    invite_code: str | None = None

    @property
    def subject(self) -> tuple[UserId, UUID]:
        """A batch has one join of each user, because each moves the user version."""
        return self.user_id, self.user_id


class Joined(NamedTuple):
    """The new participant, and the system message about it, if there is one. `change` is None if the user took part
    before.
    """

    change: ParticipantChange | None
    message: Message | None = None


Reason = Literal["changed", "user_held", "missing", "banned", "uninvited", "full", "inactive", "too_many"]
"""Why a user did not join. Of several reasons, it is the first one in join_conversations()."""


JOIN = f"SELECT * FROM join_conversations($1, $2, $3, $4, $5) WHERE {WITHIN_RETRY_LOCK_MS}"  # noqa: S608 - as in `SEND`
"""Makes the users of a batch participants. schema.sql has the function."""
LIMITS = (MAX_SHARED_PARTICIPANTS, MAX_MEMBERSHIPS)


def _call(db: Db, requests: str) -> Query:
    return partial(db.fetch, JOIN, requests)


def _outcome(outcome: str, max_participants: int | None, message: str | None, *change: Any) -> Joined | NotChanged:  # noqa: ANN401 - columns
    match outcome:
        case "stored":
            return Joined(decoded_change(change), None if message is None else _message_decoder.decode(message))
        case "unchanged":
            return Joined(None)
        case _:
            return NotChanged(outcome, max_participants=max_participants or 0)


FUNCTION: ChangeFunction[JoinRequest, Joined] = ChangeFunction(_call, *LIMITS, outcome=_outcome)
"""Makes users participants of conversations."""
