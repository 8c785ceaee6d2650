"""Notifications: the feed, the badge, and push subscriptions."""

from protocol import client
from protocol.codec import now
from protocol.errors import ErrorCode, Refused
from protocol.server import Badge, Done, FeedPage, PushKey
from server.context import Context
from server.domain.push_keys import require_keys
from server.queries import badge, feed, push, users


async def list_feed(context: Context, frame: client.ListFeed) -> FeedPage:
    """Return a page of the caller's feed."""
    async with context.database.searching() as db:
        found = await feed.page(db, context.user_id, frame)
    return await found.decoded()


async def see_feed(context: Context, frame: client.SeeFeed) -> Done:
    """Mark the caller's feed as seen up to a time, on all devices."""
    async with context.statement() as db:
        event = await feed.see(db, context.user_id, frame.up_to or now())
    if event is not None:
        context.events.tell_own(context.user_id, event)
    return Done()


async def get_badge(context: Context, frame: client.GetBadge) -> Badge:  # noqa: ARG001 - the table's shape
    """Return the number of unread messages, and the number of unseen entries of the feed."""
    async with context.database.counting() as db:
        return await badge.of(db, context.user_id)


async def get_push_key(context: Context, frame: client.GetPushKey) -> PushKey:  # noqa: ARG001 - as above
    """Return the key for a browser's push subscription."""
    return PushKey(key=context.services.push_key)


async def register_push(context: Context, frame: client.RegisterPush) -> Done:
    """Register a push subscription, which lasts until the session ends."""
    require_keys(frame.p256dh, frame.auth)
    async with context.transaction() as db:
        await users.lock(db, [context.user_id])
        is_new = await push.register(db, frame, context.user_id, context.session_id)
        if is_new is None:
            raise Refused(ErrorCode.UNAUTHENTICATED, "Your session has ended. Log in again.")
        if is_new:
            context.services.new_endpoints.require(context.user_id, path="endpoint")
    return Done()


async def unregister_push(context: Context, frame: client.UnregisterPush) -> Done:
    """Delete a push subscription."""
    async with context.transaction() as db:
        await push.unregister(db, context.user_id, frame.endpoint)
    return Done()
