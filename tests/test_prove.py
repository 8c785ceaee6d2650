"""`openchat prove`: its verdict on a correct server, and on servers with one defect each."""

import asyncio
import contextlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

from loadtest.proxy import Proxy
from loadtest.target import Unusable
from protocol.ids import ConversationId, MessageId, UserId, uuid7
from protocol.values import Conversation, Participant
from prove import faults, pairs, report, run
from prove.cluster import Cluster, OwnCluster
from prove.faults import FAULTS, Fault
from prove.mirror import Copy
from prove.run import Outcome, Proof, Run
from prove.truth import differences
from server.core.config import Settings
from server.hub import unsure
from server.hub.comparisons import AFTER_END_SECONDS, COMPARE_USERS_SECONDS
from tests.relay import Relay, Spoil
from tests.world import World

SELDOM = 20
"""One in `SELDOM` events is affected by a defect."""
Answer = Callable[[bytes], bytes | None]


def honest(frame: bytes) -> list[bytes]:
    return [frame]


def passes_through(frame: bytes) -> None:
    del frame


def one_in_seldom(spoil: Spoil, kind: bytes = b'{"type":"message_sent"') -> Spoil:
    """Return a function that applies `spoil` to one in `SELDOM` events."""
    seen = 0

    def spoiled(frame: bytes) -> list[bytes]:
        nonlocal seen
        seen += frame.startswith(kind)
        return spoil(frame) if frame.startswith(kind) and seen % SELDOM == 0 else [frame]

    return spoiled


def first_position_only() -> Spoil:
    """Return a function that drops all positions of a user in a conversation but the first of each kind."""
    seen: set[bytes] = set()

    def spoiled(frame: bytes) -> list[bytes]:
        if not frame.startswith((b'{"type":"message_read"', b'{"type":"message_delivered"')):
            return [frame]
        whose = frame.partition(b',"message_id"')[0]
        is_first = whose not in seen
        seen.add(whose)
        return [frame] if is_first else []

    return spoiled


def late() -> Spoil:
    """Delay one in `SELDOM` events until the next event of its conversation was sent."""
    held: dict[bytes, bytes] = {}

    def about(frame: bytes) -> bytes:
        return frame.partition(b'"conversation_id":"')[2][:36]

    def keep(frame: bytes) -> list[bytes]:
        held[about(frame)] = frame
        return []

    hold = one_in_seldom(keep)

    def spoiled(frame: bytes) -> list[bytes]:
        if frame.startswith(b'{"type":"message_sent"') and (waiting := held.pop(about(frame), None)) is not None:
            return [frame, waiting]
        return hold(frame)

    return spoiled


def invents(frame: bytes) -> list[bytes]:
    """Replace the id of the message with a new one."""
    return [re.sub(rb'"message":\{"id":"[^"]*"', b'"message":{"id":"%s"' % str(uuid7()).encode(), frame)]


def repeats(frame: bytes) -> list[bytes]:
    return [frame, frame]


def garbles(frame: bytes) -> list[bytes]:
    return [frame.replace(b"Message 0.", b"Massage 0.")]


class Forgets:
    """Acknowledges a message without storing it."""

    def __init__(self) -> None:
        self._seen = 0

    def __call__(self, frame: bytes) -> bytes | None:
        if not frame.startswith(b"{"):
            return None
        asked = msgspec.json.decode(frame)
        if asked["type"] != "send":
            return None
        self._seen += 1
        if self._seen % 20:
            return None
        sent = {key: asked[key] for key in ("conversation_id", "message_id")}
        result = {"type": "sent", "version": 10_000, "created_at": "2026-01-01T00:00:00Z", **sent}
        return msgspec.json.encode({"type": "reply", "re": asked["id"], "result": result})


async def outcome_of(
    settings: Settings, down: Callable[[], Spoil], up: Answer = passes_through, *, fault: Fault = FAULTS[0]
) -> Outcome:
    """Run one phase against a server with a defect, and return the outcome."""
    settings = msgspec.structs.replace(settings, heartbeat_seconds=3.0, login_attempts_per_address=1000)
    async with World(settings) as world:
        port = int(world.url.rpartition(":")[2])
        proof = Proof(seed=1, people=8, rate=120, where="here")
        cluster = Cluster(world.url, settings.database_url, settings.redis_url)
        async with Relay(port, down, up).serve() as spoiled, Proxy(("127.0.0.1", spoiled)) as proxy:
            run = Run(cluster, proxy, proof, step=lambda _: None, tick=lambda: None)
            await run.prepare()
            outcome = await run.phase(fault, 3.0)
            await run.stop()
        assert outcome.acknowledged > 75
        assert ("frames were answered in 1 phase." in report.verdict(proof)) == outcome.is_good == proof.is_good
        return outcome


async def test_correct_server_passes(settings: Settings) -> None:
    outcome = await outcome_of(settings, lambda: honest)
    assert outcome.is_good, outcome.violations


@pytest.mark.long
@pytest.mark.parametrize("name", ["row held", "busy account"])
async def test_correct_server_passes_under_a_fault(
    name: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "FAULT_SECONDS", 2.0)
    (fault,) = (one for one in FAULTS if one.name == name)
    outcome = await outcome_of(settings, lambda: honest, fault=fault)
    assert outcome.is_good, outcome.violations


@pytest.mark.long
async def test_devices_of_a_busy_account_are_compared_with_the_rows(settings: Settings) -> None:
    async def add_device(context: faults.FaultContext) -> None:
        context.devices.append(context.actors[0].another_device(7))
        await context.devices[0].connect()
        context.devices[0].mirror.shown.add(MessageId(uuid7()))

    outcome = await outcome_of(settings, lambda: honest, fault=Fault("one more device", "", add_device))
    assert (outcome.phantom, outcome.lost, outcome.wrong) == (1, 0, 0)


@pytest.mark.parametrize(
    ("defect", "up", "kind"),
    [
        pytest.param(lambda: one_in_seldom(lambda _: []), passes_through, "lost", id="an event is dropped"),
        pytest.param(
            first_position_only,
            passes_through,
            "lost",
            id="a state is dropped",
            marks=pytest.mark.long,
        ),
        pytest.param(
            lambda: one_in_seldom(lambda frame: [frame, frame]),
            passes_through,
            "duplicated",
            id="an event comes twice",
            marks=pytest.mark.long,
        ),
        pytest.param(late, passes_through, "out_of_order", id="an event is overtaken", marks=pytest.mark.long),
        pytest.param(
            lambda: one_in_seldom(invents),
            passes_through,
            "phantom",
            id="an event of a message that is not stored",
            marks=pytest.mark.long,
        ),
        pytest.param(
            lambda: one_in_seldom(garbles),
            passes_through,
            "wrong",
            id="an event says something else",
            marks=pytest.mark.long,
        ),
        pytest.param(
            lambda: honest, Forgets(), "lost", id="acknowledged before the commit, which fails", marks=pytest.mark.long
        ),
    ],
)
async def test_each_defect_is_detected(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, defect: Callable[[], Spoil], up: Answer, kind: str
) -> None:
    monkeypatch.setattr(run, "STATES_SECONDS", 2.0)
    outcome = await outcome_of(settings, defect, up)
    assert getattr(outcome, kind) > 0, outcome
    assert outcome.violations


async def test_final_check_reports_wrong_rows(world: World) -> None:
    await world.channel(await world.connect(await world.user("Ada")))
    await world.db.execute("UPDATE conversation SET message_count = 7")
    cluster = Cluster(world.url, world.settings.database_url, world.settings.redis_url)
    run = Run(
        cluster,
        Proxy(cluster.address),
        Proof(seed=1, people=1, rate=1, where="here"),
        step=lambda _: None,
        tick=lambda: None,
    )
    await run.check()
    (outcome,) = run.proof.outcomes
    assert (outcome.wrong, outcome.is_good, len(outcome.violations)) == (1, False, 1)
    assert outcome.violations[0].startswith("wrong: message counts match the rows")


async def test_proxy_loses_the_last_bytes_and_never_reorders() -> None:
    """As with TCP, bytes in flight on a slow connection arrive before the cut."""
    ready, go, over = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def speak(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await ready.wait()
        writer.write(b"first ")
        await go.wait()
        writer.write(b"second")
        await over.wait()
        writer.close()

    listening = await asyncio.start_server(speak, "127.0.0.1", 0)
    async with listening, Proxy(listening.sockets[0].getsockname()) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(proxy.url.rpartition(":")[2]))
        async with asyncio.timeout(5):
            while not proxy.pipes:
                await asyncio.sleep(0)
        (pipe,) = proxy.pipes
        pipe.delay = 0.2
        ready.set()
        await asyncio.sleep(0.05)
        pipe.is_cut_short = True
        go.set()
        heard = b""
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(5):
                while more := await reader.read(100):
                    heard += more
        writer.close()
        over.set()
        await asyncio.sleep(0.05)
    assert heard == b"first sec"


def test_phase_without_frames_has_no_figures_and_is_not_counted() -> None:
    acted = Outcome(name="no fault", about="", sent=1_000, acknowledged=1_000, waits=[0.25])
    left = Outcome(name="people leave", about="")
    assert report.cells(acted) == ["1,000", "1,000", "0", "0", "0", "0", "0", "0", "0.25 s", "0.25 s"]
    assert report.cells(left) == ["-", "-", "-", "-", "-", "-", "0", "-", "-", "-"]
    proof = Proof(seed=1, people=1, rate=1, where="here", outcomes=[acted, left])
    assert report.verdict(proof).startswith("1,000 frames were answered in 1 phase. ")
    left.record("lost", 2, "two events")
    assert report.cells(left)[2] == "2"
    assert report.verdict(proof) == "Guarantees were violated in: people leave."


def test_difference_names_only_the_fields_that_differ() -> None:
    about, user = ConversationId(uuid7()), UserId(uuid7())
    now = datetime.now(UTC)
    chat = Conversation(id=about, type="group", created_by=user, participant_count=1, version=1, created_at=now)
    member = Participant(conversation_id=about, user_id=user, role="member", joined_at=now, version=2)
    promoted = msgspec.structs.replace(member, role="admin", version=3)
    copy, rows = Copy(3, chat, {user: member}), Copy(3, chat, {user: promoted})
    assert differences(copy, rows) == [f"{user}: Participant: role 'member' is 'admin', version 2 is 3"]
    assert differences(copy, copy) == []
    assert differences(copy, Copy(3, chat)) == [f"{user}: {member} is None"]


def prove(*arguments: str) -> tuple[int, str]:
    """Run `openchat prove` and return its exit status and output."""
    command = [sys.executable, "-m", "server.cli.main", "prove", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_crowd_waits_longer_than_workers_need_to_find_lost_events() -> None:
    slowest = max(*AFTER_END_SECONDS, *unsure.AGES, COMPARE_USERS_SECONDS)
    assert min(run.MAX_WAIT_SECONDS, pairs.SETTLE_SECONDS) > slowest


@pytest.mark.long
def test_prove_command_writes_its_report(tmp_path: Path) -> None:
    size = ("--people", "8", "--rate", "60", "--seconds", "3")
    status, said = prove(*size, "--only", "worker killed", "--report", str(tmp_path))
    assert status == 0, said
    assert "Nothing was lost" in said
    assert "Load average: " in said
    (written,) = tmp_path.glob("*.json")
    proof = msgspec.json.decode(written.read_bytes(), type=Proof)
    assert [one.name for one in proof.outcomes] == ["worker killed", "people leave", "check"]
    assert proof.outcomes[0].acknowledged > 80
    assert proof.outcomes[0].reconnects > 0
    assert len(proof.moments) > 5
    (page,) = tmp_path.glob("*.html")
    assert "<svg" in page.read_text()
    assert "src=" not in page.read_text()


@pytest.mark.long
def test_cluster_that_does_not_start_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(Unusable, match="OPENCHAT_NONSENSE is not a setting"):
        asyncio.run(OwnCluster(1, OPENCHAT_NONSENSE="1").__aenter__())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
@pytest.mark.parametrize("fault", ["primary killed", "primary silent"])
def test_nothing_acknowledged_is_lost_when_a_synchronous_standby_takes_over(fault: str) -> None:
    status, said = prove(fault, "--seconds", "5", "--people", "8", "--rate", "40")
    assert status == 0, said
    assert f"{fault}: everyone had an answer again " in said


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--only", "earthquake"], "no fault matches"),
        (["--url", "http://127.0.0.1:9"], "--database-url and --redis-url"),
    ],
)
def test_prove_refuses_invalid_arguments(arguments: list[str], why: str) -> None:
    status, said = prove(*arguments)
    assert status == 1
    assert why in said
