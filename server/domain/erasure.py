"""Erases users, after the grace period of a deleted account or when an administrator asks for it."""

import logging
from collections.abc import Awaitable, Callable
from datetime import timedelta
from functools import partial
from typing import NamedTuple, Protocol, TypeVar
from uuid import UUID

from protocol.ids import ConversationId, UserId
from server.context import Events
from server.core.errors import log_failure
from server.core.faults import is_lost
from server.db.database import Database, Db
from server.domain.publish import publish_participant
from server.queries import conversations, erasure, participants, users
from server.queries.erasure import Cleared
from server.queries.participants import ParticipantChange

log = logging.getLogger(__name__)

Result = TypeVar("Result")
FIRST = UserId(UUID(int=0))


class _Unrelated(NamedTuple):
    """Progress in ending a user's relationships. `is_any_held` tells whether locked users were skipped."""

    last: UserId
    is_any_held: bool


class Atomic(Protocol):
    """Runs transactions. `Database` implements it, and so does the command line's connection."""

    async def atomically(self, what: str, work: Callable[[Db], Awaitable[Result]]) -> Result:
        """Return the result of `work` in a transaction."""


async def erase_due(database: Database, events: Events, grace: timedelta) -> None:
    """Erase users whose grace period is over, and publish their departures. An erasure that fails is logged and left to
    a later run. Raises the errors of the query for due users, because without a database the run ends.
    """
    tell = partial(publish_participant, events)
    tried: set[UserId] = set()
    while due := await _due(database, grace, tried):
        for user_id in due:
            tried.add(user_id)
            try:
                await erase(database, user_id, tell, grace=grace)
            except Exception as error:  # noqa: BLE001 - the other users are due, too
                log_failure(log, f"erasing {user_id}", error)
                if is_lost(error):
                    break  # the query for due users tells a lost database from a slow statement


async def _due(database: Database, grace: timedelta, tried: set[UserId]) -> list[UserId]:
    async with database.connection() as db:
        return await erasure.due(db, grace, tried)


async def erase(
    database: Atomic, user_id: UserId, tell: Callable[[ParticipantChange], None], *, grace: timedelta | None = None
) -> None:
    """Erase a user, who may be online. End the user's sessions, and make the user leave all conversations as `leave`
    does, so that each keeps an owner. Then delete the user's data.

    Each transaction changes a bounded number of rows, and only the last one marks the user as erased. A repetition
    after a crash, or for an erased user, deletes the remaining data. `tell` gets each change of a participant after its
    commit, even if a later step fails.

    With `grace`, do nothing unless the user deleted their own account at least that long ago.
    """
    if not await database.atomically("erasure", partial(_shut_out, user_id, grace)):
        return
    after, is_any_held = FIRST, False
    while (page := await database.atomically("erasure", partial(_unrelate, user_id, after))) or is_any_held:
        after, is_any_held = (page.last, is_any_held or page.is_any_held) if page else (FIRST, False)
    await _let_out(database, user_id, tell)
    cleared: Cleared | None = Cleared()
    while cleared is not None:
        cleared = await database.atomically("erasure", partial(_clear, user_id, cleared))
    while await database.atomically("erasure", partial(_forget_some, user_id)):
        pass
    while not await database.atomically("erasure", partial(_forget, user_id)):
        await _let_out(database, user_id, tell)


async def _let_out(database: Atomic, user_id: UserId, tell: Callable[[ParticipantChange], None]) -> None:
    """Make a user leave all conversations that they participate in or are invited to."""
    for conversation_id in await database.atomically("erasure", partial(_there, user_id)):
        for change in await database.atomically("erasure", partial(_leave, user_id, conversation_id)):
            tell(change)


async def _shut_out(user_id: UserId, grace: timedelta | None, db: Db) -> bool:
    await erasure.lock_out_references(db, user_id)
    return await erasure.shut_out(db, user_id, grace)


async def _unrelate(user_id: UserId, after: UserId, db: Db) -> _Unrelated | None:
    """End the relationships of a user with a page of others, those after an id. Return None if there are none. It waits
    for the lock of the first one only, and skips others that are locked. So it never holds some users while it waits
    for another.
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


async def _clear(user_id: UserId, cleared: Cleared, db: Db) -> Cleared | None:
    await users.lock(db, [user_id])
    return await erasure.clear(db, user_id, cleared)


async def _forget_some(user_id: UserId, db: Db) -> bool:
    await users.lock(db, [user_id])
    return await erasure.forget_some(db, user_id)


async def _forget(user_id: UserId, db: Db) -> bool:
    """Delete the remaining data of a user who participates in nothing, if it fits one transaction. Return whether it
    did. The lock makes a concurrent reply in the user's thread, which follows that thread for the user, come before or
    fail.
    """
    await erasure.lock_out_references(db, user_id)
    if await erasure.conversations(db, user_id) or await erasure.forget_some(db, user_id):
        return False
    await erasure.forget(db, user_id)
    return True
