"""A transaction that PostgreSQL aborts is retried once: its work is done, published and charged exactly once."""

from collections import Counter
from typing import Any

import pytest

from protocol import client, server
from protocol.codec import encode
from protocol.ids import ConversationId, MessageId, UserId, uuid7
from protocol.server import Error
from protocol.values import User
from server.app import background
from server.app.app import App
from server.context import Context
from server.core.config import Settings
from server.gateway.dispatch import Dispatch
from server.hub import comparisons
from server.hub.hub import Hub
from server.limits.shared_rate_limit import SharedRateLimit
from server.routes import ROUTES
from tests.test_credentials import administer
from tests.test_lock_order import AS_BEFORE, NOT_NOW, ConflictingWrites
from tests.world import World, http_client, sent

FAIL = """
CREATE SEQUENCE tries MINVALUE -9;
CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    IF nextval('tries') < 0 THEN RAISE EXCEPTION 'made by a test' USING ERRCODE = '{code}'; END IF;
    RETURN NULL;
END $$;
"""
"""The last statement of a transaction, with all that the handler collected: the commit fails."""
AT_COMMIT = """
CREATE CONSTRAINT TRIGGER fail AFTER INSERT OR UPDATE OR DELETE ON "{table}" DEFERRABLE INITIALLY DEFERRED
FOR EACH ROW EXECUTE FUNCTION fail()
"""
ARM = "SELECT setval('tries', $1, false)"
HAS_FAILED = "SELECT is_called FROM tries"
TABLES = """
SELECT relname FROM pg_class
WHERE relnamespace = 'public'::regnamespace AND relkind = 'r' AND relname <> 'schema_migration'
"""
VERSIONS = "SELECT id, version FROM conversation"


def dispatch_of(app: App) -> Dispatch:
    """Return a dispatch with the rate limits and queues of a worker."""
    return Dispatch(
        ROUTES, app._rate_limits, metrics=app.metrics, load_shedding=app.load_shedding,  # noqa: SLF001
        lock_queue=app._lock_queue,  # noqa: SLF001
    )  # fmt: skip


class Published:
    """Counts the events that a worker publishes."""

    def __init__(self, events: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        self.versions: Counter[tuple[ConversationId, int]] = Counter()
        publish = events.publish

        def noted(event: Any, **options: Any) -> None:
            self.versions[event.conversation_id, event.version] += 1
            publish(event, **options)

        monkeypatch.setattr(events, "publish", noted)


@pytest.mark.parametrize("code", ["40P01", "55P03"])
async def test_frame_whose_first_attempt_is_aborted_is_published_once(
    world: World, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    """Every frame that writes is tested, after a deadlock and after a wait for a locked row."""
    failed: set[str] = set()
    async with http_client(world.url) as http:
        conflicting = ConflictingWrites(world, http)
        await conflicting.begin()
        here = world.workers[0].app
        told = Published(here.hub, monkeypatch)
        dispatch = dispatch_of(here)
        context = Context(
            services=here._services,  # noqa: SLF001
            user=User(id=conflicting.ada, name="Ada"),
            session_id=conflicting.sessions[conflicting.ada],
        )
        await world.db.execute(FAIL.format(code=code))
        await world.db.execute(ARM, 1)
        for (table,) in await world.db.fetch(TABLES):
            await world.db.execute(AT_COMMIT.format(table=table))
        for index, name in enumerate(type(frame).__name__ for frame in conflicting.frames()):
            before = {one: version for one, version in await world.db.fetch(VERSIONS)}  # noqa: C416 - not pairs
            told.versions.clear()
            await world.db.execute(ARM, -1)
            answer = await dispatch.run(context, encode(conflicting.frames()[index]))
            if await world.db.fetchval(HAS_FAILED):
                failed.add(name)
            await world.db.execute(ARM, 1)
            assert not isinstance(answer, Error) or answer.code not in NOT_NOW, (name, answer)
            moved = {
                (one, number)
                for one, version in await world.db.fetch(VERSIONS)
                for number in range(before.get(one, 0) + 1, version + 1)
                if one in before
            }
            published = {one: count for one, count in told.versions.items() if one[0] in before}
            assert (name, published) == (name, dict.fromkeys(moved, 1))
            if not await world.db.fetchval(AS_BEFORE, conflicting.group):
                await conflicting.reconcile()
    assert len(failed) > 30, failed


async def test_retried_forward_takes_its_tokens_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    require = SharedRateLimit.require

    def noted(self: SharedRateLimit, user_id: UserId, count: int = 1, **options: Any) -> None:
        taken.append(count)
        require(self, user_id, count, **options)

    ada = await world.connect(await world.user("Ada"))
    about = await world.channel(ada)
    said = await sent(ada, about, "é" * 10_000)
    await world.db.execute(FAIL.format(code="40P01"))
    await world.db.execute(AT_COMMIT.format(table="message"))
    monkeypatch.setattr(SharedRateLimit, "require", noted)
    for tries in (1, -1):
        taken.clear()
        await world.db.execute(ARM, tries)
        frame = client.Forward(
            conversation_id=about, message_id=said, to_conversation_id=about, new_message_id=MessageId(uuid7())
        )
        await ada.call(frame, server.Sent)
        assert await world.db.fetchval(HAS_FAILED)
        assert taken == [1, 1]


GONE_LONG_AGO = """
UPDATE "user" SET is_deleted = true, is_active = false, deleted_at = now() - interval '1 year' WHERE id = $1
"""
AT_LEAVING = """
CREATE CONSTRAINT TRIGGER fail AFTER UPDATE ON conversation_participant DEFERRABLE INITIALLY DEFERRED
FOR EACH ROW WHEN (new.conversation_id = '{}' AND new.status = 'left') EXECUTE FUNCTION fail()
"""


@pytest.mark.parametrize("by", ["the job", "a command"])
async def test_erasure_aborted_twice_publishes_every_committed_departure(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    monkeypatch.setattr(comparisons, "COMPARE_SECONDS", 3600.0)
    monkeypatch.setattr(comparisons, "COMPARE_USERS_SECONDS", 3600.0)
    for name in ("CLEAR_SECONDS", "EXPIRE_SECONDS", "DUE_SECONDS"):
        monkeypatch.setattr(background, name, 36_000.0)
    async with World(settings) as world:
        ada, charles = await world.users("Ada", "Charles")
        other = await world.connect(charles, 1)
        groups = sorted([await world.group(other, ada) for _ in range(2)])
        await world.db.execute(FAIL.format(code="40P01"))
        await world.db.execute(AT_LEAVING.format(groups[1]))
        await world.db.execute(ARM, -3)
        if by == "the job":
            await world.db.execute(GONE_LONG_AGO, ada.id)
            await world.workers[0].app.background.erase_due()
            assert not await world.db.fetchval('SELECT erased_at IS NOT NULL FROM "user" WHERE id = $1', ada.id)
            await world.workers[0].app.background.erase_due()
        else:
            await administer(world, "erase", str(ada.id), "--yes")
        for group in groups:
            await other.event(server.ParticipantLeft, lambda event, group=group: event.conversation_id == group)  # type: ignore[misc]
        left = Counter(event.conversation_id for event in other.events if isinstance(event, server.ParticipantLeft))
        assert left == dict.fromkeys(groups, 1)
