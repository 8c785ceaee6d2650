"""The proof: what it says of a server that keeps its word, and of servers that break it, each in one way."""

import asyncio
import contextlib
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from protocol.ids import uuid7
from prove import report
from prove.cluster import Cluster
from prove.faults import FAULTS
from prove.proxy import Proxy
from prove.run import Outcome, Proof, Run
from server.core.config import Settings
from tests.relay import Relay, Spoil
from tests.world import World

SELDOM = 20
"""A defect strikes once in so many events."""
Answer = Callable[[bytes], bytes | None]


def honest(frame: bytes) -> list[bytes]:
    return [frame]


def hands_on(frame: bytes) -> None:
    del frame


def now_and_then(spoil: Spoil, kind: bytes = b'{"type":"message_sent"') -> Spoil:
    """Return what spoils one event in SELDOM."""
    seen = 0

    def spoiled(frame: bytes) -> list[bytes]:
        nonlocal seen
        seen += frame.startswith(kind)
        return spoil(frame) if frame.startswith(kind) and seen % SELDOM == 0 else [frame]

    return spoiled


def late() -> Spoil:
    """Hold one event in SELDOM back until the next one of its conversation has gone by."""
    held: dict[bytes, bytes] = {}

    def about(frame: bytes) -> bytes:
        return frame.partition(b'"conversation_id":"')[2][:36]

    def keep(frame: bytes) -> list[bytes]:
        held[about(frame)] = frame
        return []

    hold = now_and_then(keep)

    def spoiled(frame: bytes) -> list[bytes]:
        if frame.startswith(b'{"type":"message_sent"') and (waiting := held.pop(about(frame), None)) is not None:
            return [frame, waiting]
        return hold(frame)

    return spoiled


def invents(frame: bytes) -> list[bytes]:
    """Say that another message was sent, which nobody sent, in place of the one that was."""
    return [re.sub(rb'"message":\{"id":"[^"]*"', b'"message":{"id":"%s"' % str(uuid7()).encode(), frame)]


def repeats(frame: bytes) -> list[bytes]:
    return [frame, frame]


def garbles(frame: bytes) -> list[bytes]:
    return [frame.replace(b"Message 0.", b"Massage 0.")]


class Forgets:
    """Answers that a message is stored, and does not store it."""

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


async def proven(settings: Settings, down: Callable[[], Spoil], up: Answer = hands_on) -> Outcome:
    """Prove one phase of a server with a defect, and return what is said of it."""
    settings = msgspec.structs.replace(settings, heartbeat_seconds=3.0, login_attempts_per_address=1000)
    async with World(settings) as world:
        port = int(world.url.rpartition(":")[2])
        proof = Proof(seed=1, people=8, rate=120, where="here")
        cluster = Cluster(world.url, settings.database_url, settings.redis_url)
        async with Relay(port, down, up).serve() as spoiled, Proxy("127.0.0.1", spoiled) as proxy:
            run = Run(cluster, proxy, proof, step=lambda _: None, tick=lambda: None)
            await run.prepare()
            outcome = await run.phase(FAULTS[0], 3.0)
            await run.stop()
        assert outcome.acknowledged > 75
        assert ("phases" in report.verdict(proof)) == outcome.is_good == proof.is_good
        return outcome


async def test_a_server_that_keeps_its_word_is_believed(settings: Settings) -> None:
    outcome = await proven(settings, lambda: honest)
    assert outcome.is_good, outcome.violations


@pytest.mark.parametrize(
    ("defect", "up", "kind"),
    [
        pytest.param(lambda: now_and_then(lambda _: []), hands_on, "lost", id="an event is dropped"),
        pytest.param(
            lambda: now_and_then(lambda frame: [frame, frame]),
            hands_on,
            "duplicated",
            id="an event comes twice",
            marks=pytest.mark.long,
        ),
        pytest.param(late, hands_on, "out_of_order", id="an event is overtaken", marks=pytest.mark.long),
        pytest.param(
            lambda: now_and_then(invents),
            hands_on,
            "phantom",
            id="an event of a message that is not stored",
            marks=pytest.mark.long,
        ),
        pytest.param(
            lambda: now_and_then(garbles), hands_on, "wrong", id="an event says something else", marks=pytest.mark.long
        ),
        pytest.param(
            lambda: honest, Forgets(), "lost", id="acknowledged before the commit, which fails", marks=pytest.mark.long
        ),
    ],
)
async def test_a_server_that_breaks_its_word_is_caught(
    settings: Settings, defect: Callable[[], Spoil], up: Answer, kind: str
) -> None:
    outcome = await proven(settings, defect, up)
    assert getattr(outcome, kind) > 0, outcome
    assert outcome.violations


async def test_what_is_wrong_in_the_end_is_found(world: World) -> None:
    await world.channel(await world.connect(await world.user("Ada")))
    await world.db.execute("UPDATE conversation SET message_count = 7")
    cluster = Cluster(world.url, world.settings.database_url, world.settings.redis_url)
    run = Run(
        cluster,
        Proxy(*cluster.address),
        Proof(seed=1, people=1, rate=1, where="here"),
        step=lambda _: None,
        tick=lambda: None,
    )
    await run.check()
    (outcome,) = run.proof.outcomes
    assert (outcome.wrong, outcome.is_good, len(outcome.violations)) == (1, False, 1)
    assert outcome.violations[0].startswith("wrong: message counts match the rows")


async def test_the_bad_network_loses_what_comes_last_and_never_turns_it_around() -> None:
    """What is on its way when a slow connection is cut comes before what is cut: anything else no TCP would do."""
    ready, go, over = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def speak(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await ready.wait()
        writer.write(b"first ")
        await go.wait()
        writer.write(b"second")
        await over.wait()
        writer.close()

    listening = await asyncio.start_server(speak, "127.0.0.1", 0)
    async with listening, Proxy(*listening.sockets[0].getsockname()) as proxy:
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


def prove(*arguments: str) -> tuple[int, str]:
    """Run `openchat prove`; return its exit status and what it said."""
    command = [sys.executable, "-m", "server.cli.main", "prove", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.long
def test_prove_from_the_command_line(tmp_path: Path) -> None:
    size = ("--people", "8", "--rate", "60", "--seconds", "3")
    status, said = prove(*size, "--only", "worker killed", "--report", str(tmp_path))
    assert status == 0, said
    assert "Nothing was lost" in said
    (written,) = tmp_path.glob("*.json")
    proof = msgspec.json.decode(written.read_bytes(), type=Proof)
    assert [one.name for one in proof.outcomes] == ["worker killed", "people leave", "check"]
    assert proof.outcomes[0].acknowledged > 80
    assert proof.outcomes[0].reconnects > 0
    assert len(proof.moments) > 5
    (page,) = tmp_path.glob("*.html")
    assert "<svg" in page.read_text()
    assert "src=" not in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--only", "earthquake"], "no fault matches"),
        (["--url", "http://127.0.0.1:9"], "--database-url and --redis-url"),
    ],
)
def test_prove_refuses_what_it_cannot_do(arguments: list[str], why: str) -> None:
    status, said = prove(*arguments)
    assert status == 1
    assert why in said
