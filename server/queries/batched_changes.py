"""Changes that many users make, such as reactions, votes and joins, in statements of many users."""

from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar
from uuid import UUID

import msgspec
from asyncpg import Record

from protocol.ids import ConversationId, MessageId, UserId
from server.db.database import Db
from server.fairness.lanes import HELD, Held
from server.queries import batches


class ChangeRequest(msgspec.Struct, frozen=True):
    """A change that a user requests. Derived classes have the further fields of a composite type of schema.sql. `place`
    is not among them.
    """

    conversation_id: ConversationId

    @property
    def subject(self) -> tuple[UserId, UUID]:
        """The user, and the object of the change. A batch has at most one change with the same subject."""
        raise NotImplementedError


class MessageChangeRequest(ChangeRequest, frozen=True):
    """A change that a user requests about a message."""

    message_id: MessageId
    user_id: UserId

    @property
    def subject(self) -> tuple[UserId, UUID]:
        """The user and the message."""
        return self.user_id, self.message_id


class NotChanged(NamedTuple):
    """A change that was not made, with the reason as the function returns it. `wait_ms` is the time until the user may
    send in slow mode, in milliseconds. `option_count` is the number of options of a poll, and `max_participants` the
    setting of a conversation.
    """

    reason: str
    wait_ms: int = 0
    option_count: int = 0
    max_participants: int = 0


AGAIN = "changed"
"""The reason for which another attempt may succeed. The user joined while the statement ran, or the batch has an
earlier request with the same subject.
"""

USER_HELD = "user_held"
"""The reason for which the user has to wait: another transaction has locked the user's row."""

Request = TypeVar("Request", bound=ChangeRequest)
Outcome = TypeVar("Outcome")


class ChangeFunction(Generic[Request, Outcome]):
    """A function of schema.sql that makes changes of many users, and returns the outcome of each."""

    def __init__(
        self, call: Callable[[Db, str], batches.Query], *limits: int, outcome: Callable[..., Outcome | NotChanged]
    ) -> None:
        """`call` returns the statement with its connection and its requests, as JSON. The other parameters are those of
        a `Query` and `limits`. Each row has the place of a request in the batch, and then the arguments of `outcome`.
        The first one is the outcome in a word.
        """
        self._call = call
        self._limits = limits
        self._outcome = outcome

    async def waiting(self, db: Db, batch: Sequence[Request]) -> list[Outcome | NotChanged | Held]:
        """Make the changes of a batch, and return their outcomes in its order. The outcome is `HELD` if the
        conversations stay locked for `RETRY_LOCK_MS`. Raises what `batches.waiting` raises.
        """
        rows = await batches.waiting(self._call(db, _encoded(batch)), *self._limits, count=len(batch))
        return self._outcomes(rows, len(batch))

    async def passing(self, db: Db, batch: Sequence[Request]) -> list[Outcome | NotChanged | Held]:
        """Do the same, but skip locked conversations, whose outcome is `HELD`. So is that of a single change that would
        wait for another row. Raises what `batches.passing` raises.
        """
        rows = await batches.passing(self._call(db, _encoded(batch)), *self._limits, count=len(batch))
        return [HELD] if rows is None else self._outcomes(rows, len(batch))

    def _outcomes(self, rows: Sequence[Record], count: int) -> list[Outcome | NotChanged | Held]:
        outcomes: list[Outcome | NotChanged | Held] = [NotChanged(AGAIN)] * count
        for place, *outcome in rows:
            outcomes[place] = HELD if outcome[0] == "held" else self._outcome(*outcome)
        return outcomes


def _encoded(batch: Sequence[ChangeRequest]) -> str:
    """Return requests as JSON, with their places. Leaves out further ones with the same subject, because each depends
    on the one before.
    """
    first: dict[tuple[UserId, UUID], tuple[int, ChangeRequest]] = {}
    for place, item in enumerate(batch):
        first.setdefault(item.subject, (place, item))
    rows = [{"place": place} | msgspec.structs.asdict(item) for place, item in first.values()]
    return msgspec.json.encode(rows).decode()
