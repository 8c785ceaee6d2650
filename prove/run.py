"""A run. In each phase people act, a fault is injected, the people pause, and what each received is compared with the
rows.
"""

import asyncio
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence

import asyncpg
import msgspec

from loadtest.load_average import LoadAverage
from loadtest.proxy import Proxy
from loadtest.target import Unusable, some_at_once
from protocol import client, server
from protocol.ids import ConversationId, uuid7
from prove import truth
from prove.accounts import Account
from prove.actor import Actor, Tally
from prove.cluster import Cluster
from prove.faults import Fault, FaultContext
from prove.mirror import Copy

CHANNELS = 6
WARM_UP_SECONDS = 2.0
"""Time before a fault, in seconds."""
MAX_WAIT_SECONDS = 60.0
"""Max wait for an answer after a phase, in seconds. After that, it counts as lost."""
PRESENCE_SECONDS = 20.0
"""Max time until presence is correct after a fault, in seconds. docs/operations.md promises 15."""
STATES_SECONDS = 30.0
"""Max time until positions and faces are those stored, after people stop acting, in seconds. The last comparison after
the end of a worker starts 15 seconds after it.
"""
SAMPLE = 10
"""Number of people whose unread counts are recounted after each phase."""
MAX_VIOLATIONS, MAX_CHARACTERS = 20, 500
"""Max violations reported per phase, and max characters of each."""


class Outcome(msgspec.Struct, kw_only=True):
    """One row of the table. `waits` has each person's longest time from the first attempt to the answer, in seconds."""

    name: str
    about: str
    begin: float = 0.0
    end: float = 0.0
    sent: int = 0
    acknowledged: int = 0
    lost: int = 0
    duplicated: int = 0
    out_of_order: int = 0
    phantom: int = 0
    wrong: int = 0
    reconnects: int = 0
    waits: list[float] = []
    ends: dict[str, int] = {}
    """Why connections ended."""
    violations: list[str] = []
    """Descriptions of the violations."""
    remark: str = ""
    """The result of the fault, such as the time of the recovery."""

    @property
    def is_good(self) -> bool:
        """Whether there was no violation."""
        return not (self.lost or self.duplicated or self.out_of_order or self.phantom or self.wrong)

    @property
    def wait_p50(self) -> float:
        """The median wait."""
        return statistics.median(self.waits) if self.waits else 0.0

    @property
    def wait_max(self) -> float:
        """The longest wait."""
        return max(self.waits, default=0.0)

    def record(self, kind: str, count: int, text: str) -> None:
        """Count violations of a kind, and describe them."""
        if count:
            setattr(self, kind, getattr(self, kind) + count)
            if len(self.violations) < MAX_VIOLATIONS:
                self.violations.append(f"{kind.replace('_', ' ')}: {text[:MAX_CHARACTERS]}")


class Moment(msgspec.Struct):
    """The state of the run after one second."""

    at: float
    answers: float
    waiting: float
    """The longest time that a client has been waiting for an answer, in seconds."""
    connected: int


class Proof(msgspec.Struct, kw_only=True):
    """The whole run."""

    seed: int
    people: int
    rate: float
    where: str
    load_average: LoadAverage = msgspec.field(default_factory=LoadAverage.begin)
    outcomes: list[Outcome] = []
    moments: list[Moment] = []

    @property
    def is_good(self) -> bool:
        """Whether there was no violation."""
        return bool(self.outcomes) and all(one.is_good for one in self.outcomes)


class Run:
    """The actors of a run, and its results."""

    def __init__(
        self, cluster: Cluster, proxy: Proxy, proof: Proof, *, step: Callable[[str], None], tick: Callable[[], None]
    ) -> None:
        """`step` shows the current step, and `tick` is called every second."""
        self._cluster = cluster
        self._proxy = proxy
        self.proof = proof
        self._step = step
        self._tick = tick
        self._random = random.Random(proof.seed)
        self._actors: list[Actor] = []
        self._channels: list[ConversationId] = []
        self._began = time.monotonic()
        self._ticking: asyncio.Task[None] | None = None

    async def prepare(self) -> None:
        """Create accounts and channels, and connect all actors. Raises Unusable if the server refuses."""
        self._step("creating accounts …")
        accounts = await some_at_once(
            Account.register(self._cluster.url, f"Person {number}") for number in range(self.proof.people)
        )
        for number, account in enumerate(accounts):
            actor = Actor(
                account,
                lambda: [self._proxy.url],
                self._channels,
                self.proof.seed * 1_000 + number,
                log_in=account.log_in,
            )
            actor.others = [one.id for one in accounts if one is not account]
            self._actors.append(actor)
        await asyncio.gather(*(actor.connect() for actor in self._actors))
        founder = self._actors[0].client
        if founder is None:
            raise Unusable("no client can connect.")
        for number in range(CHANNELS):
            made = ConversationId(uuid7())
            await founder.call(client.CreateChannel(conversation_id=made, title=f"Channel {number}", is_public=True))
            self._channels.append(made)
        self._ticking = asyncio.create_task(self._watch())

    async def phase(self, fault: Fault, seconds: float) -> Outcome:
        """Inject a fault while people act for at least `seconds`, then pause and compare."""
        outcome = Outcome(name=fault.name, about=fault.about)
        self.proof.outcomes.append(outcome)
        for actor in self._actors:
            actor.tally = Tally()
        self._step(f"{fault.name}: {fault.about}")
        is_over = asyncio.Event()
        acting = [asyncio.create_task(self._act(actor, is_over)) for actor in self._actors]
        end = time.monotonic() + seconds
        await asyncio.sleep(WARM_UP_SECONDS)
        outcome.begin = time.monotonic() - self._began
        context = FaultContext(self._cluster, self._proxy, self._actors, self._random, [])
        outcome.remark = await fault.inject(context) or ""
        outcome.end = time.monotonic() - self._began
        await asyncio.sleep(max(WARM_UP_SECONDS, end - time.monotonic()))
        is_over.set()
        self._step(f"{fault.name}: waiting for answers …")
        _, stuck = await asyncio.wait(acting, timeout=MAX_WAIT_SECONDS)
        for task in stuck:
            task.cancel()
        outcome.record("lost", len(stuck), f"{len(stuck)} people had no answer after {MAX_WAIT_SECONDS:.0f} s more")
        for task in acting:
            if task not in stuck:
                task.result()
        self._step(f"{fault.name}: comparing …")
        await self._compare(outcome, [*self._actors, *context.devices])
        await asyncio.gather(*(device.leave() for device in context.devices))
        return outcome

    async def leave(self) -> None:
        """Disconnect half of the people, and check that the others see them offline."""
        outcome = Outcome(name="people leave", about="half of them disconnect, and others see them offline")
        self.proof.outcomes.append(outcome)
        self._step(outcome.about)
        gone, left = self._actors[::2], self._actors[1::2]
        await asyncio.gather(*(actor.leave() for actor in gone))
        await self._check_presence(outcome, left, gone)

    async def check(self) -> None:
        """Run `openchat check`."""
        outcome = Outcome(name="check", about="openchat check recounts everything from the rows")
        self.proof.outcomes.append(outcome)
        self._step(outcome.about)
        for line in await self._cluster.check():
            outcome.record("wrong", not line.is_good, f"{line.check}: {', '.join(line.some or ())}")

    async def stop(self) -> None:
        """Disconnect everyone."""
        if self._ticking is not None:
            self._ticking.cancel()
        await asyncio.gather(*(actor.leave() for actor in self._actors))

    # ------------------------------------------------------------------------------------------------- comparing

    async def _compare(self, outcome: Outcome, actors: Sequence[Actor]) -> None:
        for actor in actors:
            tally = actor.tally
            outcome.sent += tally.sent
            outcome.acknowledged += tally.acknowledged
            outcome.reconnects += tally.reconnects
            outcome.waits.append(tally.longest_wait)
            for end, count in tally.ends.items():
                outcome.ends[end] = outcome.ends.get(end, 0) + count
            for text, count in tally.unexpected.items():
                outcome.record("wrong", count, f"refused {text}")
        await self._cluster.ready()
        db = await self._cluster.database()
        try:
            await self._wait_for_scheduled(db, outcome)
            clocks = {row[0]: row[1] for row in await db.fetch("SELECT id, version FROM conversation")}
            settled = await asyncio.gather(*(actor.settle(clocks.__getitem__) for actor in actors))
            for actor, is_settled in zip(actors, settled, strict=True):
                outcome.record("lost", not is_settled, f"{actor.account.name} does not receive the current versions")
            await self._wait_for_states(db, outcome, actors)
            truths = {one: await truth.read_conversation(db, one) for one in self._everywhere(actors)}
            for actor in actors:
                await self._compare_one(db, outcome, actor, truths)
            for difference in await truth.recount(db):
                outcome.record("wrong", 1, f"a recount differs: {difference}")
            for actor in self._random.sample(self._actors, min(SAMPLE, len(self._actors))):
                await self._recount_unread(db, outcome, actor)
        finally:
            await db.close()
        await self._check_presence(outcome, self._actors, [])

    async def _wait_for_scheduled(self, db: "asyncpg.Connection[asyncpg.Record]", outcome: Outcome) -> None:
        """Wait until due scheduled messages are sent. After a worker died, another one sends its messages later."""
        deadline = time.monotonic() + MAX_WAIT_SECONDS
        while (left := await truth.waiting(db)) and time.monotonic() < deadline:  # noqa: ASYNC110 - another process's
            await asyncio.sleep(0.25)
        outcome.record("lost", left, f"{left} scheduled messages are not sent")

    async def _wait_for_states(
        self, db: "asyncpg.Connection[asyncpg.Record]", outcome: Outcome, actors: Sequence[Actor]
    ) -> None:
        """Wait until all actors have the stored positions and faces of which they have received earlier ones."""
        deadline = time.monotonic() + STATES_SECONDS
        for actor in actors:
            while older := await truth.behind(db, actor.account.id, actor.mirror.current_states):
                if time.monotonic() > deadline:
                    outcome.record("lost", len(older), f"{actor.account.name} has older states: {older[:3]}")
                    break
                await asyncio.sleep(0.25)

    def _everywhere(self, actors: Sequence[Actor]) -> set[ConversationId]:
        return set().union(*(actor.mirror.copies for actor in actors))

    async def _compare_one(
        self,
        db: "asyncpg.Connection[asyncpg.Record]",
        outcome: Outcome,
        actor: Actor,
        truths: dict[ConversationId, Copy],
    ) -> None:
        name, mirror = actor.account.name, actor.mirror
        absent = await truth.absent(db, "message", actor.tally.messages)
        outcome.record("lost", absent, f"{absent} acknowledged messages of {name} are not stored")
        absent = await truth.absent(db, "message_edit", actor.tally.edits)
        outcome.record("lost", absent, f"{absent} acknowledged edits of {name} are not stored")
        for difference in await truth.unsent(db, actor.tally.scheduled):
            outcome.record("lost", 1, f"a scheduled message of {name}: {difference}")
        absent = await truth.absent(db, "message", mirror.shown)
        outcome.record("phantom", absent, f"{absent} messages that {name} saw are not stored")
        ahead = await truth.ahead(db, mirror.states.values())
        outcome.record("phantom", ahead, f"{ahead} positions, names or pictures that {name} saw are not stored")
        outcome.record("lost", actor.noticed_losses, f"a heartbeat revealed events that {name} did not receive")
        for kind, count in mirror.wrong.items():
            outcome.record({"out of order": "out_of_order", "duplicated": "duplicated"}.get(kind, "wrong"), count,
                          f"{count} {kind} events for {name}")  # fmt: skip
        there = await truth.memberships(db, actor.account.id)
        outcome.record(
            "wrong", len(there ^ mirror.copies.keys()), f"{name} participates in other conversations than received"
        )
        for one, copy in list(mirror.copies.items()):
            outcome.record(
                "lost", len(copy.missing), f"{name} did not receive the versions {sorted(copy.missing)} of {one}"
            )
            found = truth.differences(copy, truths[one])
            outcome.record("wrong", len(found), f"{name}: {'; '.join(found[:2])}")
            if copy.missing or found:
                # The server sends the conversation again, so the next phase does not report this violation again.
                mirror.forget(one)
                await actor.leave()
        mirror.wrong, mirror.shown, actor.noticed_losses = Counter(), set(), 0

    async def _recount_unread(self, db: "asyncpg.Connection[asyncpg.Record]", outcome: Outcome, actor: Actor) -> None:
        if not actor.mirror.copies:
            return
        one = self._random.choice(list(actor.mirror.copies))
        reply = await actor.ask(client.GetConversation(conversation_id=one), server.OneConversation)
        counted = await truth.unread(db, actor.account.id, one)
        outcome.record(
            "wrong", reply.view.unread_count != counted,
            f"{reply.view.unread_count} unread for {actor.account.name} in {one}, and {counted} counted",
        )  # fmt: skip

    async def _check_presence(self, outcome: Outcome, there: Sequence[Actor], gone: Sequence[Actor]) -> None:
        """Check that everyone's presence is shown correctly within `PRESENCE_SECONDS`."""
        expected = {actor.account.id: actor.is_visible for actor in there} | {actor.account.id: False for actor in gone}
        await asyncio.gather(*(actor.connected() for actor in there))
        deadline = time.monotonic() + PRESENCE_SECONDS
        watcher = there[0]
        # If one of them blocks the other, the watcher sees a user as offline, or not at all (docs/privacy.md).
        blocks = {
            (actor.account.id, one.user_id)
            for actor in self._actors
            for one in actor.mirror.relationships.values()
            if one.kind == "block" and one.status == "active"
        }
        me = watcher.account.id
        expected |= {one: False for one in expected if {(me, one), (one, me)} & blocks}
        while True:
            known = await watcher.ask(client.Watch(user_ids=list(expected)), server.PresenceList)
            unlike = [one.user_id for one in known.presences if expected[one.user_id] != (one.status != "offline")]
            if not unlike or time.monotonic() > deadline:
                break
            await asyncio.sleep(0.25)
        names = {actor.account.id: actor.account.name for actor in self._actors}
        outcome.record("wrong", len(unlike), f"presence of {', '.join(names[one] for one in unlike[:5])}")

    # ---------------------------------------------------------------------------------------------------- people

    async def _act(self, actor: Actor, is_over: asyncio.Event) -> None:
        await actor.act(rate=self.proof.rate / len(self._actors), is_over=is_over.is_set)

    async def _watch(self) -> None:
        before = 0
        while True:
            await asyncio.sleep(1)
            now = time.monotonic()
            answers = sum(actor.tally.acknowledged for actor in self._actors)
            self.proof.moments.append(
                Moment(
                    at=now - self._began,
                    answers=max(0, answers - before),
                    waiting=max(now - actor.asked_at if actor.asked_at else 0.0 for actor in self._actors),
                    connected=sum(actor.client is not None for actor in self._actors),
                )
            )
            before = answers
            self._tick()
