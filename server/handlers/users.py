"""Users: their faces, their presence, and that they are typing."""

from protocol import client
from protocol.limits import MAX_SHARED_PARTICIPANTS
from protocol.server import Done, PresenceList, TypingStarted, TypingStopped, UserList
from server.context import Context
from server.errors import NotFound
from server.queries import conversations, users


async def get(context: Context, frame: client.GetUsers) -> UserList:
    """Return the public faces of users."""
    async with context.database.connection() as db:
        return UserList(users=await users.get(db, context.user_id, frame.user_ids))


async def typing(context: Context, frame: client.Typing) -> Done:
    """Tell the others in a small conversation that the caller is typing, or stopped."""
    async with context.database.connection() as db:
        size = await conversations.size(db, frame.conversation_id, context.user_id)
    if size is None:
        raise NotFound("conversation_id")
    if size <= MAX_SHARED_PARTICIPANTS:
        event = TypingStarted if frame.active else TypingStopped
        context.events.relay(
            frame.conversation_id, event(conversation_id=frame.conversation_id, user_id=context.user_id)
        )
    return Done()


async def set_presence(context: Context, frame: client.SetPresence) -> Done:
    """Record how the caller wants to be seen."""
    await context.services.presence.choose(context.user_id, context.subscriber, frame)
    return Done()


async def watch(context: Context, frame: client.Watch) -> PresenceList:
    """Begin to deliver the presence of users; return it as it is now."""
    # Follow first, look second: a change in between is delivered, not missed.
    connection = context.connection
    presence = context.services.presence
    allowed = [seen.user_id for seen in await presence.seen_by(context.user_id, frame.user_ids)]
    await connection.watch(allowed)
    return PresenceList(presences=await presence.seen_by(context.user_id, allowed))


async def unwatch(context: Context, frame: client.Unwatch) -> Done:
    """Deliver it no more."""
    context.connection.unwatch(frame.user_ids)
    return Done()
