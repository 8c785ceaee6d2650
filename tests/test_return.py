"""When a worker drains, its clients reconnect elsewhere, with a delay and a ticket that is valid once."""

import asyncio
import contextlib
import signal

import pytest
from redis.asyncio import Redis
from websockets.exceptions import InvalidStatus

from protocol import client, server
from protocol.codec import encode
from protocol.errors import CloseCode, ErrorCode, Refused
from protocol.ids import ConversationId, uuid7
from prove.client import Client
from tests.test_command import Program, folder, program, registered, workers_of
from tests.world import UserSession, World, message, sent, until

__all__ = ["folder", "program"]


async def drained(world: World, who: UserSession) -> tuple[Client, server.GoingAway]:
    """Connect a user to the first worker, and drain that worker."""
    one = await world.connect(who)
    await world.workers[0].app.drain()
    assert await one.closed() == CloseCode.GOING_AWAY
    return one, await one.event(server.GoingAway)


async def test_ticket_is_valid_once_and_token_always(world: World) -> None:
    ada, charles = await world.users("Ada", "Charles")
    other = await world.connect(charles, 1)
    channel = await world.channel(other, is_public=True)
    first = await world.connect(ada)
    await first.call(client.Join(conversation_id=channel))
    version = (await first.call(client.GetConversation(conversation_id=channel), server.OneConversation)).view.version
    _, word = await drained(world, ada)
    assert word.ticket is not None
    assert 0 <= word.reconnect_after_ms <= 10_000
    missed = await sent(other, channel, "Missed")

    back = await world.connect(UserSession(ada.id, ada.name, word.ticket), 1, query="?resume=1")
    assert back.ready.user.id == ada.id
    await back.call(client.Resume(epoch=back.ready.epoch, versions={channel: version}))
    changes = await back.event(server.Changes)
    assert [event.message.id for event in changes.events if isinstance(event, server.MessageSent)] == [missed]
    # The user version changed after the login, which must not send all conversations again.
    await back.synced()
    assert not [event for event in back.events if isinstance(event, (server.ConversationJoined, server.StartOver))]
    with pytest.raises(InvalidStatus, match="401"):
        await Client(world.workers[1].url, word.ticket).open()
    await world.connect(ada, 1)


async def test_ticket_of_a_revoked_session_is_refused(world: World) -> None:
    ada = await world.user("Ada")
    _, word = await drained(world, ada)
    await world.db.execute("DELETE FROM session WHERE user_id = $1", ada.id)
    assert word.ticket is not None
    with pytest.raises(InvalidStatus, match="401"):
        await Client(world.workers[1].url, word.ticket).open()


async def test_changes_before_a_resume_are_sent_after_it(world: World) -> None:
    ada, charles = await world.users("Ada", "Charles")
    other = await world.connect(charles, 1)
    first = await world.connect(ada)
    channel = await world.channel(first)
    version = (await first.call(client.GetConversation(conversation_id=channel), server.OneConversation)).view.version
    await first.close()
    back = await world.connect(ada, query="?resume=1")
    group = await world.group(other, ada)  # this worker is notified, and rechecks the user
    await other.synced()
    await back.call(client.Resume(epoch=back.ready.epoch, versions={channel: version}))
    joined = await back.event(server.ConversationJoined)
    await back.synced()
    said = [event.view.conversation.id for event in back.events if isinstance(event, server.ConversationJoined)]
    assert said == [joined.view.conversation.id] == [group]


async def test_only_the_hash_of_a_ticket_is_stored(world: World) -> None:
    _, word = await drained(world, await world.user("Ada"))
    assert word.ticket is not None
    async with Redis.from_url(world.settings.redis_url) as redis:
        keys = [key async for key in redis.scan_iter("*openchat:return:*")]
        stored = [await redis.get(key) for key in keys]
    assert stored
    for bare in (word.ticket, word.ticket.partition(".")[2]):
        assert not [one for one in keys + stored if bare.encode() in one]


async def test_refused_ticket_does_not_invalidate_the_token(world: World) -> None:
    """An invented or used ticket is refused, in a header and in a frame. The error for a refused token differs."""
    ada = await world.user("Ada")
    _, word = await drained(world, ada)
    assert word.ticket is not None
    async with Client(world.workers[1].url, word.ticket):
        pass
    for bad in ("ticket.made-up", word.ticket):
        with pytest.raises(InvalidStatus, match="401") as refused:
            await Client(world.workers[1].url, bad).open()
        body = refused.value.response.body or b""
        assert b"Connect with the token." in body
        assert b"Log in" not in body
        assert b'"path":"ticket"' in body
        one = Client(world.workers[1].url, None)
        await one.open()
        error = await one.raw(encode(client.Authenticate(token=bad)).decode())
        assert (error.code, error.message) == (
            "unauthenticated",
            "This ticket is used or too old. Connect with the token.",
        )
        code = await one.closed()
        assert code is not None
        assert CloseCode(code).reconnect
    one = Client(world.workers[1].url, None)
    await one.open()
    assert "Log in again." in (await one.raw(encode(client.Authenticate(token="made-up")).decode())).message
    assert await one.closed() == CloseCode.UNAUTHENTICATED
    assert not CloseCode.UNAUTHENTICATED.reconnect
    async with Client(world.workers[1].url, ada.token):
        pass


async def test_workers_are_replaced_one_by_one_while_users_write(program: Program) -> None:
    logged_in = await registered(program.url)
    before = set(workers_of(program))
    one = Client(program.url, logged_in.token)
    await one.__aenter__()
    channel = ConversationId(uuid7())
    await one.call(client.CreateChannel(conversation_id=channel, title="Talk"))
    acknowledged = []
    program.process.send_signal(signal.SIGHUP)

    async def again() -> Client:
        fresh = Client(program.url, logged_in.token)
        return await fresh.__aenter__()

    while before & set(workers_of(program)):
        frame = message(channel)
        while frame.message_id not in acknowledged:
            if one.is_over:
                one = await again()  # without delay, since another worker always accepts connections
            await asyncio.sleep(0.001)  # or a closing connection, which refuses immediately, is never seen as closed
            with contextlib.suppress(ConnectionError):
                try:
                    await one.call(frame)
                except Refused as refused:
                    # On a busy machine, replacing the workers takes longer than a user's burst lasts.
                    assert refused.code is ErrorCode.RATE_LIMITED, refused
                    await asyncio.sleep((refused.retry_after_ms or 0) / 1000)
                    continue
                acknowledged.append(frame.message_id)
    assert len(workers_of(program)) == 2
    await one.close()
    async with Client(program.url, logged_in.token) as last:
        stored = []
        after = None
        while True:
            page = await last.call(client.History(conversation_id=channel, before=after, limit=100), server.MessagePage)
            stored += [one.id for one in page.messages]
            if not page.has_before:
                break
            after = page.messages[0].id
    assert sorted(stored) == sorted(acknowledged)
    assert len(stored) > 20
    await until(lambda: len(set(workers_of(program)) - before) == 2)
