"""Threads: get, list replies, follow, read, list."""

from protocol import client
from protocol.server import MessagePage, OneThread, OneThreadFollow, ThreadList
from server.context import Context
from server.core.errors import NotFound
from server.queries import bounds, conversations, messages, threads
from server.queries.cursor import Cursor
from server.queries.messages import NEWEST, Span
from server.queries.threads import FollowChange


async def get(context: Context, frame: client.GetThread) -> OneThread:
    """Return a thread as the caller sees it."""
    async with context.database.connection() as db:
        found = await threads.get(db, frame, context.user_id)
    if found is None:
        raise NotFound("message_id")
    return OneThread(thread=found)


async def list_replies(context: Context, frame: client.ListReplies) -> MessagePage:
    """Return a page of a thread's replies."""
    order = NEWEST
    span = Span(frame.message_id, frame.limit, 0)
    if frame.before_order is not None:
        order = frame.before_order
    elif frame.after_order is not None:
        order, span = frame.after_order + 1, Span(frame.message_id, 0, frame.limit)
    async with context.database.connection() as db:
        found = await messages.replies(db, frame, context.user_id, span, order=order)
    if found is None:
        raise NotFound("message_id")
    return await found.decoded()


async def follow(context: Context, frame: client.FollowThread) -> OneThreadFollow:
    """Follow a thread, so that the caller is notified of replies."""
    return await _change(context, frame, FollowChange(is_following=True))


async def unfollow(context: Context, frame: client.UnfollowThread) -> OneThreadFollow:
    """Unfollow a thread."""
    return await _change(context, frame, FollowChange(is_following=False))


async def read(context: Context, frame: client.ReadThread) -> OneThreadFollow:
    """Move the caller's read position in a thread."""
    return await _change(context, frame, FollowChange(last_read_order=frame.thread_order))


async def list_threads(context: Context, frame: client.ListThreads) -> ThreadList:
    """Return a page of the threads that the caller follows."""
    async with context.database.connection() as db:
        found = await threads.page(db, context.user_id, Cursor.read(frame.after), is_unread=frame.is_unread)
    page = await found.decoded()
    return ThreadList(threads=page.rows, after=page.after)


async def _change(
    context: Context, frame: client.FollowThread | client.UnfollowThread | client.ReadThread, change: FollowChange
) -> OneThreadFollow:
    async with context.transaction() as db:
        if not await conversations.keep(db, frame.conversation_id, context.user_id):
            raise NotFound("message_id")
        now = await threads.change(db, frame, context.user_id, change)
        if now is None:
            raise NotFound("message_id")
        if now.is_new:
            await bounds.require_threads(db, context.user_id)
    context.events.tell_own(context.user_id, now.event)
    return OneThreadFollow(follow=now.event.follow)
