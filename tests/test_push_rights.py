"""The right to a queued notification is checked when its post begins, not only when it is queued."""

import ast
import asyncio
import re
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import msgspec
import pytest

from protocol import client
from protocol.ids import ConversationId, MessageId
from prove.client import Client
from server.core.config import Settings
from tests.browser import Browser
from tests.test_house import ROOT
from tests.trees import parsed
from tests.world import UserSession, World, http_client, sent, until


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return msgspec.structs.replace(settings, push_after_seconds=0.0, private_addresses=True)


class Case(NamedTuple):
    """A reader whose browser does not answer the first post, so that the second one waits."""

    world: World
    ada: Client
    reader: Client
    who: UserSession
    browser: Browser
    group: ConversationId
    message_id: MessageId

    @property
    def at(self) -> dict[str, object]:
        return {"conversation_id": self.group, "message_id": self.message_id}


async def nothing(case: Case) -> None:
    """The reader keeps the right."""


async def delete(case: Case) -> None:
    await case.ada.call(client.Delete(**case.at))  # type: ignore[arg-type]


async def moderate(case: Case) -> None:
    await case.world.moderate_as_owner(client.Moderate(**case.at, reason="Rude"))  # type: ignore[arg-type]


async def ban(case: Case) -> None:
    await case.ada.call(client.RemoveParticipant(conversation_id=case.group, user_id=case.who.id, ban=True))


async def leave(case: Case) -> None:
    await case.reader.call(client.Leave(conversation_id=case.group))


async def revoke(case: Case) -> None:
    async with http_client(case.world.url) as http:
        await http.delete("/v1/auth/sessions", headers={"Authorization": f"Bearer {case.who.token}"})


async def block(case: Case) -> None:
    ada = await case.world.db.fetchval("SELECT sender_id FROM message WHERE id = $1", case.message_id)
    await case.reader.call(client.Block(user_id=ada))


async def read(case: Case) -> None:
    await case.reader.call(client.Read(**case.at))  # type: ignore[arg-type]


async def unregister(case: Case) -> None:
    await case.reader.call(client.UnregisterPush(endpoint=case.browser.url))


async def edit(case: Case) -> None:
    """The reader keeps the right, and the content changes."""
    await case.ada.call(client.Edit(**case.at, content="Edited"))  # type: ignore[arg-type]


LATE: dict[Callable[[Case], Awaitable[None]], list[str]] = {
    nothing: ["Secret"], edit: ["Edited"], delete: [], moderate: [], ban: [], leave: [], revoke: [], block: [],
    read: [], unregister: [],
}  # fmt: skip
"""The content that is pushed after each act."""


async def test_queued_notification_is_pushed_only_while_its_reader_may_see_it(world: World) -> None:
    ada, *readers = await world.users("Ada", *(act.__name__.title() for act in LATE))
    sender = await world.connect(ada)
    queue = world.workers[0].app.web_push._posts  # noqa: SLF001
    cases: dict[Callable[[Case], Awaitable[None]], Case] = {}
    try:
        for act, who in zip(LATE, readers, strict=True):
            await world.befriend(ada, who)
            browser = Browser()
            await browser.start()
            browser.answers.clear()
            reader = await world.connect(who)
            await reader.call(browser.subscription())
            group = await world.group(sender, who)
            first = await sent(sender, group, "First")
            cases[act] = Case(world, sender, reader, who, browser, group, first)
        await until(lambda: all(case.browser.received.qsize() == 1 for case in cases.values()))
        for act, case in cases.items():
            cases[act] = case._replace(message_id=await sent(sender, case.group, "Secret"))
        await until(lambda: queue._queued == len(cases))  # noqa: SLF001
        for act, case in cases.items():
            await act(case)
        for case in cases.values():
            case.browser.answers.set()
        await until(lambda: not queue._queued and not queue._tasks)  # noqa: SLF001
        pushed: dict[str, list[str]] = {}
        for act, case in cases.items():
            assert (await case.browser.next())[1].body == "First"
            pushed[act.__name__] = [(await case.browser.next())[1].body for _ in range(case.browser.received.qsize())]
    finally:
        await asyncio.gather(*(case.browser.stop() for case in cases.values()))
    assert pushed == {act.__name__: bodies for act, bodies in LATE.items()}


def test_queues_hold_ids_and_no_content() -> None:
    """A queued post or page is named by ids, and its content is read when its turn comes."""
    words = {"Message", "Notice", "Push", "Notification", "bytes", "Send", "Outgoing"}
    queue = re.compile(r"(deque|asyncio\.Queue|OrderedDict)\b")
    nodes = [
        (path.stem, node)
        for path in (ROOT / "server").rglob("*.py")
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.AnnAssign) and queue.match(ast.unparse(node.annotation))
    ]
    assert ("push_hosts", "self.queue") in {(name, ast.unparse(node.target)) for name, node in nodes}
    assert [
        f"{name}.{ast.unparse(node.target)}"
        for name, node in nodes
        if {part.id for part in ast.walk(node.annotation) if isinstance(part, ast.Name)} & words
    ] == []
