"""Relationships: friend requests and their answers; blocks, follows and mutes, which need no answer; switches; the
list.
"""

from typing import Literal, NamedTuple

from protocol import client
from protocol.errors import ErrorCode, Refused
from protocol.ids import UserId
from protocol.server import Done, OneRelationship, RelationshipPage
from protocol.values import Relationship, RelationshipKind, RelationshipStatus
from server.context import Context
from server.core.errors import NotActive, NotFound
from server.db.database import Db
from server.domain.permissions import OwnBlock, unreachable
from server.queries import approaches, bounds, relationships, users
from server.queries.relationships import RelationshipChange


class _Request(NamedTuple):
    """The result of a friend request."""

    becomes: RelationshipStatus
    is_answer: bool
    """Whether the other user has sent a request, too."""
    same: Relationship | None
    """The existing relationship if the request repeats an earlier one. The other user gets no news of it."""


async def request_friend(context: Context, frame: client.RequestFriend) -> OneRelationship:
    """Send a friend request. If the other user has sent one, become friends."""
    me, them = context.user_id, _other(context, frame.user_id)
    async with context.transaction() as db:
        # Checked before the lock, too, here and below, so that a frame that is refused or changes nothing locks no
        # stranger.
        request = await _request(db, me, frame)
        if request.same is not None:
            return OneRelationship(relationship=request.same)
        if request.becomes == "pending":
            await approaches.require(db, "friend", me, [them])
        await _lock(db, me, them)
        request = await _request(db, me, frame)
        if request.same is not None:
            return OneRelationship(relationship=request.same)
        if request.is_answer:
            await relationships.put(db, them, me, RelationshipChange("friend", "accepted"), me)
        if request.becomes == "pending":
            await approaches.count(db, "friend", me, [them])
        made = await relationships.put(db, me, them, RelationshipChange("friend", request.becomes, frame.message), me)
        await bounds.require_relationships(db, me, "friend")
        await bounds.require_requests(db, me, them)
    _tell(context, me, them)
    return OneRelationship(relationship=made)


async def answer_friend(context: Context, frame: client.AnswerFriend) -> OneRelationship:
    """Accept or reject a friend request."""
    me, them = context.user_id, _other(context, frame.user_id)
    change = RelationshipChange("friend", "accepted" if frame.accept else "rejected", response_message=frame.message)
    async with context.transaction() as db:
        if (same := await _answered(db, me, them, change)) is not None:
            return OneRelationship(relationship=same)
        await _lock(db, me, them)
        if (same := await _answered(db, me, them, change)) is not None:
            return OneRelationship(relationship=same)
        if frame.accept:
            await _require_not_deleted(db, them)
        made = await relationships.put(db, them, me, change, me)
        if frame.accept:
            await relationships.put(db, me, them, RelationshipChange("friend", "accepted"), me)
            await bounds.require_relationships(db, me, "friend")
    _tell(context, me, them)
    return OneRelationship(relationship=made)


async def unfriend(context: Context, frame: client.Unfriend) -> Done:
    """Withdraw a friend request, or end a friendship."""
    me, them = context.user_id, _other(context, frame.user_id)
    async with context.transaction() as db:
        if await relationships.status(db, me, them, "friend") is None:
            raise NotFound("user_id")
        if not await relationships.may_end(db, me, them, "friend"):
            return Done()
        await _lock(db, me, them)
        if await relationships.status(db, me, them, "friend") is None:
            raise NotFound("user_id")
        await relationships.end(db, me, them, "friend")
    _tell(context, me, them)
    return Done()


async def block(context: Context, frame: client.Block) -> OneRelationship:
    """Block a user. This ends a friendship, and the caller's own request or follow."""
    return await _set_on(context, frame.user_id, "block", is_on=True)


async def unblock(context: Context, frame: client.Unblock) -> OneRelationship:
    """Unblock a user."""
    return await _set_on(context, frame.user_id, "block", is_on=False)


async def follow(context: Context, frame: client.Follow) -> OneRelationship:
    """Follow a user, who can see that."""
    return await _set_on(context, frame.user_id, "follow", is_on=True)


async def unfollow(context: Context, frame: client.Unfollow) -> OneRelationship:
    """Stop following a user."""
    return await _set_on(context, frame.user_id, "follow", is_on=False)


async def mute(context: Context, frame: client.Mute) -> OneRelationship:
    """Mute a user, who cannot see that."""
    return await _set_on(context, frame.user_id, "mute", is_on=True)


async def unmute(context: Context, frame: client.Unmute) -> OneRelationship:
    """Unmute a user."""
    return await _set_on(context, frame.user_id, "mute", is_on=False)


async def _set_on(
    context: Context, user_id: UserId, kind: Literal["block", "follow", "mute"], *, is_on: bool
) -> OneRelationship:
    """Begin or end a relationship that needs no answer."""
    change = RelationshipChange(kind, "active" if is_on else "inactive")
    me, them = context.user_id, _other(context, user_id)
    async with context.transaction() as db:
        if (same := await _unchanged(db, me, them, change)) is not None:
            return OneRelationship(relationship=same)
        if is_on:
            await approaches.require(db, kind, me, [them])
        await (_lock_caller if kind == "mute" else _lock)(db, me, them)
        if (same := await _unchanged(db, me, them, change)) is not None:
            return OneRelationship(relationship=same)
        if is_on:
            # Each end follows a beginning, so ends need no limit.
            await approaches.count(db, kind, me, [them])
        if kind == "block" and is_on:
            # Two calls, as if the frames `unfriend` and `unfollow` ended them.
            await relationships.end(db, me, them, "friend")
            await relationships.end(db, me, them, "follow")
        made = await relationships.put(db, me, them, change, me)
        if is_on:
            await bounds.require_relationships(db, me, kind)
    if kind == "block":
        _tell(context, me, them)
    else:
        context.events.notify([me, them] if kind == "follow" else [me])
    return OneRelationship(relationship=made)


async def set_switches(context: Context, frame: client.SetSwitches) -> OneRelationship:
    """Change what another user may see or do."""
    wanted = client.given(frame)
    me, them = context.user_id, _other(context, frame.user_id)

    async def switched(db: Db) -> tuple[Relationship, set[str]]:
        """Return the relationship, and the names of the switches that change."""
        there = await relationships.between(db, me, them)
        if not there:
            raise NotFound("user_id")
        return there[0], {
            name for name, is_on in wanted.items() if any(getattr(one.switches, name) is not is_on for one in there)
        }

    async with context.transaction() as db:
        same, changed = await switched(db)
        if not changed:
            return OneRelationship(relationship=same)
        if not all(wanted[name] for name in changed):
            await approaches.require(db, "switch", me, [them])
        await _lock(db, me, them)
        await _require_not_deleted(db, them)
        same, changed = await switched(db)
        if not changed:
            return OneRelationship(relationship=same)
        if not all(wanted[name] for name in changed):
            # A switch that is turned on was turned off before, so only turning off counts.
            await approaches.count(db, "switch", me, [them])
        made = await relationships.switch(db, me, them, wanted)
    context.events.notify([me])
    context.events.reconsider(me, them)
    return OneRelationship(relationship=made)


async def list_relationships(context: Context, frame: client.ListRelationships) -> RelationshipPage:
    """Return a page of the caller's relationships."""
    async with context.database.connection() as db:
        found = await relationships.page(db, context.user_id, frame, limit=frame.limit)
    page = await found.decoded()
    return RelationshipPage(relationships=page.rows, after=page.after)


async def _lock(db: Db, me: UserId, them: UserId) -> None:
    """Lock the relationships of two users. Raises NotActive if the caller is not active."""
    if me not in await relationships.lock(db, me, them):
        raise NotActive


async def _lock_caller(db: Db, me: UserId, them: UserId) -> None:
    """Lock the caller, for a change of the caller's own rows only, and make an erasure of the other user wait. Raises
    NotActive if the caller is not active.
    """
    if me not in await users.lock(db, [me]):
        raise NotActive
    await users.keep(db, them)


async def _request(db: Db, me: UserId, frame: client.RequestFriend) -> _Request:
    """Return the result of a friend request. Raises Refused if the caller may not send one."""
    them = frame.user_id
    if not await users.all_may(db, "request_friend", me, [them]):
        raise await unreachable(db, me, them)
    mine = await relationships.status(db, me, them, "friend")
    if mine == "rejected":
        raise Refused(
            ErrorCode.CONFLICT,
            "They declined your request; only they can send a new one. Wait for theirs.",
            path="user_id",
        )
    if mine not in {"pending", "accepted"} and await relationships.status(db, them, me, "friend") == "pending":
        return _Request("accepted", is_answer=True, same=None)
    becomes: RelationshipStatus = "accepted" if mine == "accepted" else "pending"
    same = await relationships.get(db, me, them, RelationshipChange("friend", becomes), me)
    is_same = same is not None and (becomes == "accepted" or same.request_message == frame.message)
    return _Request(becomes, is_answer=False, same=same if is_same else None)


async def _answered(db: Db, me: UserId, them: UserId, change: RelationshipChange) -> Relationship | None:
    """Return a request that already has this answer. The other user gets no news of it. Raises Refused if the caller
    cannot give this answer.
    """
    there = await relationships.status(db, them, me, "friend")
    if there != change.status and there not in {"pending", "rejected"}:
        raise NotFound("user_id")
    if change.status == "accepted" and await relationships.status(db, me, them, "block") == "active":
        raise OwnBlock
    return await relationships.get(db, them, me, change, me)


async def _unchanged(db: Db, me: UserId, them: UserId, change: RelationshipChange) -> Relationship | None:
    """Return the relationship if nothing changes. Raises Refused if it may not begin, or if it never began."""
    if change.status == "active":
        await _require_may_begin(db, change.kind, me, them)
    elif await relationships.status(db, me, them, change.kind) is None:
        raise NotFound("user_id")
    return await relationships.get(db, me, them, change, me)


async def _require_may_begin(db: Db, kind: RelationshipKind, me: UserId, them: UserId) -> None:
    if kind == "follow":
        if not await users.all_may(db, "follow", me, [them]):
            raise await unreachable(db, me, them)
    elif not await users.all_may(db, "see_face", me, [them]):
        raise NotFound("user_id")  # even if the caller blocks the user already, nothing remains to end
    await _require_not_deleted(db, them)


async def _require_not_deleted(db: Db, them: UserId) -> None:
    """Raise NotFound if a user is deleted, because the user may be erased soon. Under the user's lock, or after
    `users.keep`, the result stays true.
    """
    if await users.is_deleted(db, them):
        raise NotFound("user_id")


def _tell(context: Context, me: UserId, them: UserId) -> None:
    """Notify both users of a change between them, and recheck whether they see each other. The caller has committed."""
    context.events.notify([me, them])
    context.events.reconsider(me, them)
    context.events.reconsider(them, me)


def _other(context: Context, user_id: UserId) -> UserId:
    if user_id == context.user_id:
        raise Refused(ErrorCode.INVALID, "`user_id` must name another user.", path="user_id")
    return user_id
