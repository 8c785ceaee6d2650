"""Relationships: friends who ask and answer; block, follow and mute, which nobody has to answer; switches; the list."""

from collections.abc import Awaitable, Callable

from protocol import client
from protocol.errors import ErrorCode, Refused
from protocol.ids import UserId
from protocol.server import Done, OneRelationship, RelationshipPage
from protocol.values import RelationshipKind, RelationshipStatus
from server.context import Context
from server.database import Db
from server.errors import NotActive, NotFound
from server.permissions import OwnBlock, unreachable
from server.queries import approaches, bounds, relationships, users
from server.queries.relationships import Change


async def request_friend(context: Context, frame: client.RequestFriend) -> OneRelationship:
    """Ask for friendship; if the other one has asked already, be friends."""
    me, them = context.user_id, _other(context, frame.user_id)
    async with context.transaction() as db:
        # Asked before the lock, too, here and below: a refused frame does not lock a stranger.
        if not await users.all_may(db, "request_friend", me, [them]):
            raise await unreachable(db, me, them)
        await _lock(db, me, them)
        if not await users.all_may(db, "request_friend", me, [them]):
            raise await unreachable(db, me, them)
        mine = await relationships.status(db, me, them, "friend")
        if mine == "rejected":
            raise Refused(ErrorCode.CONFLICT, "They declined your request. Wait for theirs.", path="user_id")
        becomes: RelationshipStatus = "accepted" if mine == "accepted" else "pending"
        if mine not in {"pending", "accepted"} and await relationships.status(db, them, me, "friend") == "pending":
            becomes = "accepted"
            await relationships.put(db, them, me, Change("friend", becomes), me)
        same = await relationships.get(db, me, them, Change("friend", becomes), me)
        if same is not None and (becomes == "accepted" or same.request_message == frame.message):
            # Asked before: the other one is not told again.
            return OneRelationship(relationship=same)
        if becomes == "pending":
            await approaches.count(db, "friend", me, [them])
        made = await relationships.put(db, me, them, Change("friend", becomes, frame.message), me)
        await bounds.require_relationships(db, me, "friend")
        await bounds.require_requests(db, me, them)
    _tell(context, me, them)
    return OneRelationship(relationship=made)


async def answer_friend(context: Context, frame: client.AnswerFriend) -> OneRelationship:
    """Accept or reject a request."""
    me, them = context.user_id, _other(context, frame.user_id)
    answer: RelationshipStatus = "accepted" if frame.accept else "rejected"
    async with context.transaction() as db:
        if await relationships.status(db, them, me, "friend") is None:
            raise NotFound("user_id")
        await _lock(db, me, them)
        there = await relationships.status(db, them, me, "friend")
        if there != answer and there not in {"pending", "rejected"}:
            raise NotFound("user_id")
        if frame.accept and await relationships.status(db, me, them, "block") == "active":
            raise OwnBlock
        change = Change("friend", answer, response_message=frame.message)
        if there == answer and (same := await relationships.get(db, them, me, change, me)) is not None:
            # Answered before: the other one is not told again.
            return OneRelationship(relationship=same)
        if frame.accept:
            await _require_not_deleted(db, them)
        made = await relationships.put(db, them, me, change, me)
        if frame.accept:
            await relationships.put(db, me, them, Change("friend", "accepted"), me)
            await bounds.require_relationships(db, me, "friend")
    _tell(context, me, them)
    return OneRelationship(relationship=made)


async def unfriend(context: Context, frame: client.Unfriend) -> Done:
    """Take back a request, or end a friendship."""
    me, them = context.user_id, _other(context, frame.user_id)
    async with context.transaction() as db:
        if await relationships.status(db, me, them, "friend") is None:
            raise NotFound("user_id")
        await _lock(db, me, them)
        mine = await relationships.status(db, me, them, "friend")
        if mine is None:
            raise NotFound("user_id")
        await relationships.end(db, me, them, "friend")
    _tell(context, me, them)
    return Done()


OneOf = client.Block | client.Unblock | client.Follow | client.Unfollow | client.Mute | client.Unmute


def turned(kind: RelationshipKind, *, on: bool) -> Callable[[Context, OneOf], Awaitable[OneRelationship]]:
    """Return the handler that begins or ends what is the caller's own affair."""

    async def require(db: Db, me: UserId, them: UserId) -> None:
        if on:
            await _require_may_begin(db, kind, me, them)
        elif await relationships.status(db, me, them, kind) is None:
            raise NotFound("user_id")

    async def handler(context: Context, frame: OneOf) -> OneRelationship:
        me, them = context.user_id, _other(context, frame.user_id)
        async with context.transaction() as db:
            await require(db, me, them)
            await _lock(db, me, them)
            await require(db, me, them)
            turn = Change(kind, "active" if on else "inactive")
            if (same := await relationships.get(db, me, them, turn, me)) is not None:
                return OneRelationship(relationship=same)
            if kind == "follow" and on:
                await approaches.count(db, "follow", me, [them])
            if kind == "block" and on:
                # One after the other, as if each were ended by itself.
                await relationships.end(db, me, them, "friend")
                await relationships.end(db, me, them, "follow")
            made = await relationships.put(db, me, them, turn, me)
            if on:
                await bounds.require_relationships(db, me, kind)
        if kind == "block":
            _tell(context, me, them)
        else:
            context.events.poke([me, them] if kind == "follow" else [me])
        return OneRelationship(relationship=made)

    return handler


async def set_switches(context: Context, frame: client.SetSwitches) -> OneRelationship:
    """Say what someone may see or do."""
    wanted = client.given(frame)
    me, them = context.user_id, _other(context, frame.user_id)
    async with context.transaction() as db:
        if not await relationships.between(db, me, them):
            raise NotFound("user_id")
        await _lock(db, me, them)
        await _require_not_deleted(db, them)
        there = await relationships.between(db, me, them)
        if not there:
            raise NotFound("user_id")
        if all(getattr(one.switches, name) is is_on for one in there for name, is_on in wanted.items()):
            return OneRelationship(relationship=there[0])
        made = await relationships.switch(db, me, them, wanted)
    context.events.poke([me])
    context.events.reconsider(me, them)
    return OneRelationship(relationship=made)


async def list_relationships(context: Context, frame: client.ListRelationships) -> RelationshipPage:
    """Return a page of what is between the caller and others."""
    async with context.database.connection() as db:
        found = await relationships.page(db, context.user_id, frame, limit=frame.limit)
    page = await found.decoded()
    return RelationshipPage(relationships=page.rows, after=page.after)


async def _lock(db: Db, me: UserId, them: UserId) -> None:
    """Lock what is between two users. Raises NotActive if the caller is not."""
    if me not in await relationships.lock(db, me, them):
        raise NotActive


async def _require_may_begin(db: Db, kind: RelationshipKind, me: UserId, them: UserId) -> None:
    if kind == "follow":
        if not await users.all_may(db, "follow", me, [them]):
            raise await unreachable(db, me, them)
    elif not await users.all_may(db, "see_face", me, [them]):
        raise NotFound("user_id")  # whoever repeats a block has nothing to end
    await _require_not_deleted(db, them)


async def _require_not_deleted(db: Db, them: UserId) -> None:
    """Raise NotFound if a user is deleted: nothing new is kept of who may be erased. Under the lock, this stays so."""
    if await users.is_deleted(db, them):
        raise NotFound("user_id")


def _tell(context: Context, me: UserId, them: UserId) -> None:
    """Tell both users of what is between them now, which decides whether they see each other. After the commit."""
    context.events.poke([me, them])
    context.events.reconsider(me, them)
    context.events.reconsider(them, me)


def _other(context: Context, user_id: UserId) -> UserId:
    if user_id == context.user_id:
        raise Refused(ErrorCode.INVALID, "`user_id` must name another user.", path="user_id")
    return user_id
