"""Brings a connection up to date: at the start, after a reconnect, and when its user's conversations change.

It always follows first and compares second. Once the worker follows a conversation, `attach` tells whether the version
that was read is still the latest. If not, the difference is read and `attach` is tried again. Later events are
delivered as usual.
"""

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack

import msgspec

from protocol.client import Resume
from protocol.errors import ErrorCode, Refused
from protocol.ids import ConversationId
from protocol.limits import MAX_CHANGES, MAX_PAGE_BYTES, MAX_SHARED_PARTICIPANTS
from protocol.server import (
    ConversationJoined,
    ConversationLeft,
    Conversations,
    OwnStartOver,
    OwnStartOverReason,
    Resumed,
    ServerFrame,
    StartOver,
    StartOverReason,
)
from protocol.values import ConversationView
from server.context import Context, UserNews
from server.db.database import Db
from server.queries import changes, conversation_views, own_news
from server.queries.changes import Difference, Reading
from server.queries.memberships import Membership
from server.queries.own_news import OWN_PAGE, OwnNews

CLOSED = Refused(ErrorCode.UNAVAILABLE, "The connection is closed. Connect again.", retry_after_ms=500)
CONVERSATIONS_PER_PAGE = 50
"""Max conversations per `conversations` frame, per statement that reads them, and per turn of the loop."""
FOLLOWED_AT_ONCE = 10 * CONVERSATIONS_PER_PAGE
"""Max conversations that a start follows before it reads them. Following takes a round trip to PostgreSQL."""


async def start(context: Context) -> None:
    """Send all of the user's conversations in pages, most recently active first, and follow them."""
    async with context.database.connection() as db:
        order = await conversation_views.order(db, context.user_id)
    # The pages are read by id, because each page of a sorted query would sort all conversations again. Conversations
    # that are joined meanwhile move the user version, which sends them.
    for start in range(0, max(1, len(order)), CONVERSATIONS_PER_PAGE):
        if start % FOLLOWED_AT_ONCE == 0:
            await context.connection.open(order[start : start + FOLLOWED_AT_ONCE])
        wanted = order[start : start + CONVERSATIONS_PER_PAGE]
        parts = await _views(context, wanted, start) if wanted else []
        for number, views in enumerate(parts or [[]], 1):
            is_last = start + CONVERSATIONS_PER_PAGE >= len(order) and number >= len(parts)
            await _follow(context, views, [Conversations(conversations=views, is_last=is_last)])
            await context.connection.drained()


async def resume(context: Context, frame: Resume) -> Resumed:
    """Send the difference to `frame.versions`, and follow these conversations. With the last frame, also send and
    follow those that the client does not have.
    """
    connection = context.connection
    there = await context.services.memberships.submit(context.user_id)
    await _say_left(context, frame.versions.keys() - there.keys())
    known = {one: version for one, version in frame.versions.items() if one in there}
    is_same_epoch = frame.epoch == context.database.epoch.id
    if is_same_epoch:
        # The versions tell the max number of changes. Reading a thousand changes to discard them costs as much as
        # sending them. A row that changed often counts each time, because counting rows would read as many index
        # entries.
        far = {one for one, version in known.items() if there[one].version - version > MAX_CHANGES}
        done = await _start_all_over(context, far, "too_many_changes")
        near = {one: version for one, version in known.items() if one not in far}
        for some in _batches(await _attach(context, near, there), there):
            await _catch_up(context, some, done=done)
            done += len(some)
    else:
        await _start_all_over(context, known, "other_epoch")
    if frame.is_last:
        await _join(context, there.keys() - frame.versions.keys() - set(connection.attached))
    connection.is_partly_resumed = not frame.is_last
    if frame.user_version is not None:
        if is_same_epoch:
            connection.user_version = frame.user_version
        else:
            _start_own_over(context, "other_epoch")
        await _say_own(context)
    told = there if frame.is_last else {one: there[one] for one in known}
    return Resumed(
        conversations=len(there),
        user_version=connection.user_version,
        read_positions={one: here.last_read for one, here in told.items() if here.last_read is not None},
        read_revisions={one: here.revision for one, here in told.items() if here.last_read is not None},
    )


async def refresh(context: Context, user_news: UserNews, whole: UserNews | None) -> None:
    """Send changes of the user's own rows. Before that, with `whole`, compare the connection's conversations with the
    user's memberships, and send the difference.
    """
    if whole is not None:
        await _compare(context, await whole.memberships())
    await _say_own(context, user_news)


async def _compare(context: Context, there: Mapping[ConversationId, Membership]) -> None:
    connection = context.connection
    if any(one not in there for one in connection.attached):
        # Shared memberships may be older than a conversation that the connection joined by its own frame.
        there = await context.services.memberships.submit(context.user_id)
    for _, some in _pages(one for one in connection.attached if one not in there):
        # Other tasks run between pages, and may have sent some of these.
        await _say_left(context, [one for one in some if one in connection.attached])
    if not connection.is_partly_resumed:
        await _join(context, [one for one in there if one not in connection.attached])


async def join(context: Context, view: ConversationView) -> None:
    """Follow a conversation that the caller created or joined. The reply comes after this, so the caller receives the
    events of all later frames.
    """
    subscriber = context.subscriber
    if subscriber is not None and view.conversation.id not in subscriber.attached:
        await _follow(context, [view], [ConversationJoined(view=view)])


async def enter(context: Context, conversation_id: ConversationId) -> ConversationView | None:
    """Do the same for a conversation that is not read yet, and return it. Return None if the caller does not take part.

    Events during the read are kept, because in a large conversation others may join at the same time.
    """
    subscriber = context.subscriber
    if subscriber is None or conversation_id in subscriber.attached:
        return await _view(context, conversation_id)
    await subscriber.open([conversation_id])
    with subscriber.catching_up(conversation_id):
        view = await _view(context, conversation_id)
        if view is not None:
            await _follow(context, [view], [ConversationJoined(view=view)])
    return view


async def _view(context: Context, conversation_id: ConversationId) -> ConversationView | None:
    async with context.database.connection() as db:
        views = await conversation_views.get(db, context.user_id, [conversation_id])
    return views[0] if views else None


async def _say_own(context: Context, user_news: UserNews | None = None) -> None:
    """Send the changes of the user's own rows after the connection's user version. `user_news` has the first page."""
    connection = context.connection
    is_whole, has_started_over, done = False, False, 0
    while not is_whole:
        version, news, is_whole, lost = await (
            user_news.news(connection.user_version) if user_news is not None and not done else _own_news(context, done)
        )
        if lost is not None and connection.user_version and not has_started_over:
            has_started_over = True
            _start_own_over(context, lost)
            is_whole = False
            continue
        # Meanwhile the worker may have sent events that are in `news`, and later ones.
        connection.say(*[one for one in news if one.user_version > connection.user_version])
        connection.user_version = max(connection.user_version, version)
        done += OWN_PAGE
        if not is_whole:
            await connection.drained()


def _start_own_over(context: Context, reason: OwnStartOverReason) -> None:
    """Make the client delete its copies of the user's own rows. All current rows follow."""
    context.connection.say(OwnStartOver(user_version=0, reason=reason))
    context.connection.user_version = 0


async def _own_news(context: Context, done: int) -> OwnNews:
    async with _reading(context, done) as db:
        found = await own_news.read(db, context.user_id, context.connection.user_version, limit=OWN_PAGE)
    return await found.decoded()


async def _join(context: Context, conversation_ids: Iterable[ConversationId]) -> None:
    for done, some in _pages(conversation_ids):
        parts = await _views(context, some, done)
        for number, views in enumerate(parts):
            await _follow(context, views, [ConversationJoined(view=view) for view in views])
            if done or number:
                await context.connection.drained()


async def _follow(context: Context, views: list[ConversationView], frames: list[ServerFrame]) -> None:
    connection = context.connection
    await connection.open([view.conversation.id for view in views])
    # From here to the last `attach` no other task runs, so the frames precede the events that follow them.
    connection.say(*frames)
    behind = [view for view in views if not connection.attach(view.conversation.id, view.version)]
    await _catch_up(context, {view.conversation.id: view.version for view in behind})


async def _attach(
    context: Context, versions: Mapping[ConversationId, int], there: Mapping[ConversationId, Membership]
) -> dict[ConversationId, int]:
    """Follow conversations. Return those that have changed since these versions, with the versions."""
    connection = context.connection
    await connection.open(list(versions))
    behind = {}
    for _, some in _pages(versions):
        await asyncio.sleep(0)
        for one in some:
            connection.detach(one)
        await connection.open(some)  # opening all of them may have taken long
        for one in some:
            if versions[one] != there[one].version or not connection.attach(one, versions[one]):
                behind[one] = versions[one]
    return behind


def _batches(
    versions: Mapping[ConversationId, int], there: Mapping[ConversationId, Membership]
) -> Iterator[dict[ConversationId, int]]:
    """Yield batches of conversations for `changes.missed`, those with few changes first. The changes of each one in a
    batch fit into its share, unless more have been made meanwhile.
    """
    batch: dict[ConversationId, int] = {}
    for one in sorted(versions, key=lambda one: there[one].version - versions[one]):
        missed = there[one].version - versions[one]
        if batch and (len(batch) == CONVERSATIONS_PER_PAGE or (len(batch) + 1) * missed > MAX_CHANGES):
            yield batch
            batch = {}
        batch[one] = versions[one]
    if batch:
        yield batch


async def _catch_up(context: Context, versions: Mapping[ConversationId, int], *, done: int = 0) -> None:
    """Send the changes after these versions, and attach the conversations. Each statement reads those of all
    conversations that fit into it. When none does, each one is read alone.
    """
    behind = dict(versions)
    while behind:
        count = len(behind)
        behind = await _say_changes(context, behind, done)
        await context.connection.drained()
        if 1 < count == len(behind):
            break
    for one, version in behind.items():
        alone = {one: version}
        while alone:
            alone = await _say_changes(context, alone, done)
            await context.connection.drained()


async def _say_changes(
    context: Context, versions: Mapping[ConversationId, int], done: int
) -> dict[ConversationId, int]:
    """Send the changes after these versions, and attach the conversations at the versions that they lead to. Return
    those that are not attached yet, with the versions that the client has then.

    If the changes of a single conversation are too many, it is sent whole.
    """
    connection = context.connection
    await connection.open(list(versions))
    behind: dict[ConversationId, int] = {}
    with ExitStack() as kept:
        for one in versions:
            kept.enter_context(connection.catching_up(one))
        async with _reading(context, done) as db:
            found = await changes.missed(db, context.user_id, versions, limit=MAX_CHANGES, most=MAX_SHARED_PARTICIPANTS)
        await _say_left(context, versions.keys() - found.keys())
        for one, missed in found.items():
            difference = await missed.difference.decoded()
            if difference.is_whole or len(versions) == 1:
                version = await _say_difference(context, difference, missed.reading, done)
                if version is None:
                    continue
                await connection.open([one])
                if connection.attach(one, version):
                    continue
                behind[one] = version
            else:
                behind[one] = versions[one]
    return behind


async def _say_difference(context: Context, difference: Difference, reading: Reading, done: int) -> int | None:
    """Send changes, and return the version that they lead to. Return None if the whole conversation was sent."""
    conversation_id = difference.changes.conversation_id
    if context.connection.is_crowd(conversation_id):
        difference = difference.of_crowd(context.user_id)
    parts = difference.parts(MAX_PAGE_BYTES) if difference.is_whole else None
    if difference.is_whole and difference.changes.since > difference.current_version:
        await _start_over(context, [conversation_id], "ahead_of_server", done=done)
        return None
    if parts is None:
        context.connection.charge(difference.size)
        await _start_over(context, [conversation_id], "too_many_changes", done=done)
        return None
    for number, part in enumerate(parts):
        if number:
            await context.connection.drained()
        context.connection.say(msgspec.structs.replace(part, **reading._asdict()))
    return difference.changes.version


async def _start_all_over(context: Context, conversation_ids: Iterable[ConversationId], reason: StartOverReason) -> int:
    """Send whole conversations, in pages. Return their number."""
    count = 0
    for done, some in _pages(conversation_ids):
        await _start_over(context, some, reason, done=done)
        await context.connection.drained()
        count = done + len(some)
    return count


async def _start_over(
    context: Context, conversation_ids: Sequence[ConversationId], reason: StartOverReason, *, done: int
) -> None:
    for conversation_id in conversation_ids:
        context.connection.detach(conversation_id)
    parts = await _views(context, conversation_ids, done)
    await _say_left(context, set(conversation_ids) - {view.conversation.id for views in parts for view in views})
    for number, views in enumerate(parts):
        if number:
            await context.connection.drained()
        await _follow(context, views, [StartOver(view=view, reason=reason) for view in views])


def _pages(conversation_ids: Iterable[ConversationId]) -> Iterator[tuple[int, list[ConversationId]]]:
    """Return the ids in pages, each with the number of ids before it."""
    every = list(conversation_ids)
    return (
        (start, every[start : start + CONVERSATIONS_PER_PAGE]) for start in range(0, len(every), CONVERSATIONS_PER_PAGE)
    )


async def _views(
    context: Context, conversation_ids: Sequence[ConversationId], done: int
) -> list[list[ConversationView]]:
    """Return the conversations as the user sees them, in parts that fit a page."""
    async with _reading(context, done) as db:
        found = await conversation_views.parts(db, context.user_id, conversation_ids)
    return await found.decoded()


def _reading(context: Context, done: int) -> AbstractAsyncContextManager[Db]:
    """Borrow a connection to the database for one statement. After the first page, clients that catch up share a part
    of the connections and take turns. Raises Refused if the client is gone, so that nothing more is read for it.
    """
    if context.connection.is_closed:
        raise CLOSED
    return context.database.connection() if done < CONVERSATIONS_PER_PAGE else context.database.catching_up()


async def _say_left(context: Context, conversation_ids: Iterable[ConversationId]) -> None:
    """Send that conversations are not the user's, with one write per page. A `resume` may name thousands."""
    for _, some in _pages(conversation_ids):
        for conversation_id in some:
            context.connection.detach(conversation_id)
        context.connection.say(*[ConversationLeft(conversation_id=one) for one in some])
        await context.connection.drained()
        await asyncio.sleep(0)
