"""Changes that are made in batches, such as reactions, votes and joins."""

from collections.abc import Callable, Mapping
from typing import TypeAlias, TypeVar

from protocol.errors import ErrorCode, Refused
from protocol.ids import ConversationId
from server.core.errors import NotActive, NotFound
from server.core.faults import RowHeld
from server.domain.permissions import OBSTACLES, slow_mode
from server.fairness.lanes import Lanes
from server.queries.batched_changes import AGAIN, USER_HELD, ChangeRequest, NotChanged

Request = TypeVar("Request", bound=ChangeRequest)
Outcome = TypeVar("Outcome")

Refusals: TypeAlias = Mapping[str, Callable[[NotChanged], Refused]]
"""Errors for changes that no further attempt would make, by the reason."""


def _forbidden(outcome: NotChanged) -> Refused:
    return Refused(ErrorCode.FORBIDDEN, OBSTACLES[outcome.reason], path="conversation_id")  # type: ignore[index]


REFUSALS: Refusals = {
    "missing": lambda _: NotFound("message_id"),
    "inactive": lambda _: NotActive(),
    "archived": _forbidden,
    "role": _forbidden,
    "unwanted": _forbidden,
    "slow": lambda outcome: slow_mode(outcome.wait_ms),
}
"""Errors for the reasons that changes of all kinds have in common."""


async def change(
    lanes: Lanes[ConversationId, Request, Outcome | NotChanged],
    request: Request,
    refusals: Refusals,
) -> Outcome:
    """Make a change in the next batch, and return its outcome. Raises the error in `refusals` if it was not made and no
    further attempt would make it. Raises RowHeld, without an effect, if the user's row is locked.
    """
    while isinstance(outcome := await lanes.submit(request), NotChanged):
        if outcome.reason == USER_HELD:
            raise RowHeld("the user is locked")
        if outcome.reason != AGAIN:
            raise refusals[outcome.reason](outcome)
    return outcome
