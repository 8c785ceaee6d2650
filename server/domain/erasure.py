"""Erasing a person, when the time of grace is over or an administrator says so."""

import logging
from collections.abc import Awaitable, Callable
from datetime import timedelta
from functools import partial
from typing import NamedTuple, Protocol, TypeVar
from uuid import UUID

from protocol.ids import ConversationId, UserId
from server.context import Events
from server.core.errors import is_lost, log_failure
from server.db.database import Database, Db
from server.domain.publish import publish_participant
from server.queries import conversations, erasure, participants, users
from server.queries.erasure import Cleared
from server.queries.participants import ParticipantChange

log = logging.getLogger(__name__)

Result = TypeVar("Result")
FIRST = UserId(UUID(int=0))


class _Unrelated(NamedTuple):
    """How far the relationships of a user are ended, and whether some were skipped because their users are held."""

    last: UserId
    is_any_held: bool


class Atomic(Protocol):
    """What runs transactions: a Database, or a connection of the command line."""

    async def atomically(self, what: str, work: Callable[[Db], Awaitable[Result]]) -> Result:
        """Return what `work` does in a transaction."""


async def erase_due(database: Database, events: Events, grace: timedelta) -> None:
    """Erase those whose time of grace is over, and publish who takes part in what now. Somebody who could not be erased
    is logged and left to a later run. Raises what asking for the next ones raises: without a database the run ends.
    """
    database = database.of_jobs()
    tell = partial(publish_participant, events)
    tried: set[UserId] = set()
    while due := await _due(database, grace, tried):
        for user_id in due:
            tried.add(user_id)
            try:
                await erase(database, user_id, tell, grace=grace)
            except Exception as error:  # noqa: BLE001 - the others are due, too
                log_failure(log, f"erasing {user_id}", error)
                if is_lost(error):
                    break  # a statement may have been too slow for the client: ask whether the database is there


async def _due(database: Database, grace: timedelta, tried: set[UserId]) -> list[UserId]:
    async with database.connection() as db:
        return await erasure.due(db, grace, tried)


async def erase(
    database: Atomic, user_id: UserId, tell: Callable[[ParticipantChange], None], *, grace: timedelta | None = None
) -> None:
    """Erase a user, who may be online: shut them out, let them out of everything they are in, as `leave` does, so that
    nothing is left without an owner, and forget them once nothing is left. A transaction changes a bounded number of
    rows, and only the last one names them erased. Done again after a crash in the middle, or for who was erased before,
    it takes away what is left. `tell` gets each change of a participant after its commit, also if a later step fails.

    With `grace`, do nothing if they did not delete their account, or came back, or deleted it not so long ago.
    """
    if not await database.atomically("erasure", partial(_shut_out, user_id, grace)):
        return
    after, is_any_held = FIRST, False
    while (page := await database.atomically("erasure", partial(_unrelate, user_id, after))) or is_any_held:
        after, is_any_held = (page.last, is_any_held or page.is_any_held) if page else (FIRST, False)
    await _let_out(database, user_id, tell)
    place: Cleared | None = Cleared()
    while place is not None:
        place = await database.atomically("erasure", partial(_clear, user_id, place))
    while await database.atomically("erasure", partial(_forget_some, user_id)):
        pass
    while not await database.atomically("erasure", partial(_forget, user_id)):
        await _let_out(database, user_id, tell)


async def _let_out(database: Atomic, user_id: UserId, tell: Callable[[ParticipantChange], None]) -> None:
    """Let a user out of everything that they take part in or are invited to."""
    for conversation_id in await database.atomically("erasure", partial(_there, user_id)):
        for change in await database.atomically("erasure", partial(_leave, user_id, conversation_id)):
            tell(change)


async def _shut_out(user_id: UserId, grace: timedelta | None, db: Db) -> bool:
    await erasure.lock_out_references(db, user_id)
    return await erasure.shut_out(db, user_id, grace)


async def _unrelate(user_id: UserId, after: UserId, db: Db) -> _Unrelated | None:
    """End what is between a user and the next ones after an id; None if there are none. Waits for the first of them
    alone, and takes those with it who are free: strangers are not held until somebody else's lock is released.
    """
    others = await erasure.related(db, user_id, after)
    if not others:
        return None
    await users.lock(db, [user_id, others[0]])
    taken = [others[0], *await users.lock_free(db, others[1:])]
    await erasure.unrelate(db, user_id, taken)
    return _Unrelated(others[-1], is_any_held=len(taken) < len(others))


async def _leave(user_id: UserId, conversation_id: ConversationId, db: Db) -> list[ParticipantChange]:
    if await conversations.lock(db, conversation_id) is None:
        await erasure.leave_deleted(db, conversation_id, user_id)
        return []
    me = await participants.get(db, conversation_id, user_id)
    if me is None or me.status not in {"active", "invited"}:
        return []
    return await participants.leave(db, me)


async def _there(user_id: UserId, db: Db) -> list[ConversationId]:
    return await erasure.conversations(db, user_id)


async def _clear(user_id: UserId, place: Cleared, db: Db) -> Cleared | None:
    await users.lock(db, [user_id])
    return await erasure.clear(db, user_id, place)


async def _forget_some(user_id: UserId, db: Db) -> bool:
    await users.lock(db, [user_id])
    return await erasure.forget_some(db, user_id)


async def _forget(user_id: UserId, db: Db) -> bool:
    """Forget a user who takes part in nothing, and has no more left than a portion; return whether that was so. A reply
    in a thread of theirs has them follow it either before, so that it is seen, or not at all.
    """
    await erasure.lock_out_references(db, user_id)
    if await erasure.conversations(db, user_id) or await erasure.forget_some(db, user_id):
        return False
    await erasure.forget(db, user_id)
    return True
