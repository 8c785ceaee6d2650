"""Erasing a person, when the time of grace is over or an administrator says so."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

from protocol.ids import UserId
from server.database import Db
from server.queries import conversations, erasure, participants
from server.queries.participants import Change

Transaction = Callable[[], AbstractAsyncContextManager[Db]]


async def erase(transaction: Transaction, user_id: UserId) -> list[Change]:
    """Let a user out of everything they are in, as `leave` does, so that nothing is left without an owner; then forget
    them. Done again after a crash in the middle, it goes on. Return who takes part in what else now.
    """
    changes: list[Change] = []
    async with transaction() as db:
        there = await erasure.conversations(db, user_id)
    for conversation_id in there:
        async with transaction() as db:
            await conversations.lock(db, conversation_id)
            me = await participants.get(db, conversation_id, user_id)
            if me is not None and me.status in {"active", "invited"}:
                changes += await participants.leave(db, me)
    async with transaction() as db:
        await erasure.forget(db, user_id)
    return changes
