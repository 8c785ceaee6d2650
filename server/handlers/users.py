"""Users: faces, profiles, presence, and typing."""

from msgspec import UNSET

from protocol import client
from protocol.errors import ErrorCode, Refused
from protocol.limits import MAX_SHARED_PARTICIPANTS
from protocol.server import (
    Done,
    OneMe,
    OneProfile,
    PresenceList,
    TypingStarted,
    TypingStopped,
    UserList,
    UserUpdated,
)
from server.context import Context
from server.core.errors import NotActive, NotFound
from server.domain import search_text
from server.domain.permissions import require_may_send
from server.queries import conversations, users


async def get(context: Context, frame: client.GetUsers) -> UserList:
    """Return the faces of users."""
    async with context.database.connection() as db:
        return UserList(users=await users.get(db, context.user_id, frame.user_ids))


async def profile(context: Context, frame: client.GetProfile) -> OneProfile:
    """Return a user's profile."""
    async with context.database.connection() as db:
        found = await users.profile(db, context.user_id, frame.user_id)
    if found is None:
        raise NotFound("user_id")
    return OneProfile(profile=found)


async def search_users(context: Context, frame: client.SearchUsers) -> UserList:
    """Return users by name."""
    query = search_text.query(frame.text, prefix=search_text.PREFIX_OF_NAMES)
    async with context.database.searching() as db:
        return UserList(users=await users.search(db, context.user_id, query, limit=frame.limit))


async def me(context: Context, frame: client.GetMe) -> OneMe:  # noqa: ARG001 - every handler's shape
    """Return the caller's own account."""
    async with context.database.connection() as db:
        return OneMe(me=await users.me(db, context.user_id))


async def update_profile(context: Context, frame: client.UpdateProfile) -> OneMe:
    """Change the caller's profile or privacy. Publish that to those who watch the caller, and to the caller's
    devices.
    """
    given = client.given(frame)
    if frame.time_zone is not UNSET:
        async with context.database.connection() as db:
            if not await users.is_time_zone(db, frame.time_zone):
                raise Refused(
                    ErrorCode.INVALID, "`time_zone` must be an IANA name such as `Europe/London`.", path="time_zone"
                )
    async with context.transaction() as db:
        if given and not await users.lock(db, [context.user_id]):
            raise NotActive
        before = await users.me(db, context.user_id)
        event = await users.update(db, context.user_id, given) if given else None
        if given and event is None:
            raise NotActive
        after = before if event is None else event.me
        if given.keys() & {"quiet_from", "quiet_until"} and (after.quiet_from is None) != (after.quiet_until is None):
            missing, other = (
                ("quiet_from", "quiet_until") if after.quiet_from is None else ("quiet_until", "quiet_from")
            )
            raise Refused(ErrorCode.INVALID, f"Give `{missing}` with `{other}`, or neither.", path=missing)
    # The recheck comes first, so that users who may no longer see the caller do not receive a new name.
    if (after.show_online_status, after.is_private) != (before.show_online_status, before.is_private):
        context.events.reconsider(context.user_id)
    if after.user != before.user:
        context.events.send_to_watchers(context.user_id, UserUpdated(user=after.user))
    if after.show_online_status != before.show_online_status:
        await context.services.presence.republish(context.user_id)
    if event is not None:
        context.events.tell_own(context.user_id, event)
    return OneMe(me=after)


async def typing(context: Context, frame: client.Typing) -> Done:
    """Publish in a small conversation that the caller is typing or has stopped."""
    async with context.database.connection() as db:
        access = await conversations.send_access(db, frame.conversation_id, context.user_id)
    if access is None:
        raise NotFound("conversation_id")
    require_may_send(access)
    if access.participant_count <= MAX_SHARED_PARTICIPANTS:
        event = TypingStarted if frame.active else TypingStopped
        context.events.relay(
            frame.conversation_id, event(conversation_id=frame.conversation_id, user_id=context.user_id)
        )
    return Done()


async def set_presence(context: Context, frame: client.SetPresence) -> Done:
    """Store the caller's chosen presence."""
    event = await context.services.presence.choose(context, frame)
    if event is not None:
        context.events.tell_own(context.user_id, event)
    return Done()


async def watch(context: Context, frame: client.Watch) -> PresenceList:
    """Watch users, and return their current presences."""
    seen = await context.connection.watch(frame.user_ids)
    return PresenceList(presences=[seen[user_id] for user_id in dict.fromkeys(frame.user_ids) if user_id in seen])


async def unwatch(context: Context, frame: client.Unwatch) -> Done:
    """Stop watching users."""
    context.connection.unwatch(frame.user_ids)
    return Done()
