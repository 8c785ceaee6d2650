"""All pairs of frames that change something, each pair sent concurrently by two devices.

Afterwards each device must have what the rows say, and what a new device receives.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from itertools import combinations_with_replacement, product
from typing import NamedTuple

import msgspec

from protocol import client, server
from protocol.client import Frame
from protocol.codec import tag
from protocol.ids import UserId
from prove import truth
from prove.actor import EXPECTED, Actor, Identity
from prove.scene import REPEATS, Side, clean_up, set_up
from prove.truth import Db
from prove.writes import OF_ADMIN, WRITES, before

SETTLE_SECONDS = 75.0
"""Max time until each device has the state of the rows, in seconds. Lost events of users are found within half
a minute, and those of conversations within a minute (docs/map.md).
"""
LATE_SECONDS = 4.0
"""A state that a device has only after this time was repaired by a comparison with PostgreSQL, in seconds."""
POLL_SECONDS = 0.02
PAIRS_PER_CREW = 20
"""Pairs that one crew acts out. Then new people continue, because the same two may approach each other only ten times
a day.
"""


class FramePair(NamedTuple):
    """Two kinds of frames. With `is_same_user`, two devices of one user send them, and else the owner and an admin."""

    first: type[Frame]
    second: type[Frame]
    is_same_user: bool

    @property
    def name(self) -> str:
        """The pair in reports."""
        whose = "one user" if self.is_same_user else "two users"
        return f"{tag(self.first)} and {tag(self.second)} of {whose}"


class Tried(msgspec.Struct):
    """How often frames of one kind were sent."""

    done: int = 0
    refused: int = 0


class PairsProof(msgspec.Struct, kw_only=True):
    """The results of a run."""

    seed: int
    pairs: int = 0
    """Pairs that were compared."""
    late: int = 0
    """Pairs after which a device was corrected by a comparison, because it had missed an event."""
    tried: dict[str, Tried] = {}
    violations: list[str] = []

    @property
    def is_good(self) -> bool:
        """Whether there was no violation."""
        return bool(self.pairs) and not self.violations


def pairs(kinds: Collection[type[Frame]] = ()) -> list[FramePair]:
    """Return all pairs, or those that contain one of `kinds`."""
    found = [FramePair(first, second, is_same_user=True) for first, second in combinations_with_replacement(WRITES, 2)]
    found += [FramePair(first, second, is_same_user=False) for first, second in product(WRITES, repeat=2)]
    return [one for one in found if not kinds or one.first in kinds or one.second in kinds]


class Crew:
    """Three people with connected devices, who act out one pair after another. Two of them have two devices."""

    def __init__(self, accounts: Sequence[Identity], urls: Sequence[str], seed: int) -> None:
        """`accounts` are those of the owner, the admin, the member and the outsider."""
        self._urls = urls
        self._seed = seed
        owner, admin, member, outsider = accounts
        self._people = [owner, admin, member]
        self.owners = [self._device(owner, 0), self._device(owner, 1)]
        self.admins = [self._device(admin, 1), self._device(admin, 0)]
        self.members = [self._device(member, 0)]
        self._outsider = outsider

    @property
    def devices(self) -> list[Actor]:
        """All devices."""
        return [*self.owners, *self.admins, *self.members]

    async def connect(self) -> None:
        """Connect all devices. Each watches all people."""
        await asyncio.gather(*(one.connect() for one in self.devices))
        watched = [one.id for one in self._people]
        await asyncio.gather(*(one.watch(watched) for one in self.devices))

    async def leave(self) -> None:
        """Disconnect all devices."""
        await asyncio.gather(*(one.leave() for one in self.devices))

    async def act(self, pair: FramePair, proof: PairsProof, db: Db) -> None:
        """Act out a pair, compare, and record the results."""
        scene = await set_up(self.owners[0], self.admins[0], self.members[0], self._outsider.id)
        if pair.is_same_user:
            is_admin = bool({pair.first, pair.second} & OF_ADMIN)
            devices = self.admins if is_admin else self.owners
        else:
            devices = [self.owners[0], self.admins[0]]
        acting = [
            (device, kind, Side(scene, device.account.id, number))
            for number, (device, kind) in enumerate(zip(devices, (pair.first, pair.second), strict=True))
        ]
        for _, kind, side in acting:
            for user_id, frame in before(kind, side):
                await next(one for one in self.devices if one.account.id == user_id).try_to(frame)
        found: list[str] = []
        await asyncio.gather(*(_send(device, kind, side, proof, found) for device, kind, side in acting))
        began = time.monotonic()
        found += await self._differences(db)
        proof.late += time.monotonic() - began > LATE_SECONDS
        proof.pairs += 1
        proof.violations += [f"{pair.name}: {one}" for one in found]
        await clean_up([self.owners[0], self.admins[0], self.members[0]])

    def _device(self, account: Identity, number: int) -> Actor:
        url = self._urls[number % len(self._urls)]
        return Actor(account, lambda: [url], (), self._seed)

    async def _differences(self, db: Db) -> list[str]:
        """Wait until all devices have the state of the rows. Return what still differs after `SETTLE_SECONDS`."""
        new = {one.id: self._device(one, 0) for one in self._people}
        await asyncio.gather(*(one.connect() for one in new.values()))
        deadline = time.monotonic() + SETTLE_SECONDS
        while found := [line for one in self.devices for line in await _unlike(db, one, new[one.account.id])]:
            if time.monotonic() > deadline:
                break
            await asyncio.sleep(POLL_SECONDS)
        await asyncio.gather(*(one.leave() for one in new.values()))
        for device in self.devices:
            device.mirror.wrong.clear()
            device.noticed_losses = 0
        return found


async def _send(device: Actor, kind: type[Frame], side: Side, proof: PairsProof, found: list[str]) -> None:
    tried = proof.tried.setdefault(tag(kind), Tried())
    for turn in range(REPEATS):
        code = await device.try_to(WRITES[kind](side, turn))
        if code is None:
            tried.done += 1
        else:
            tried.refused += 1
            if code not in EXPECTED:
                found.append(f"{tag(kind)} was answered with {code}")


async def _unlike(db: Db, device: Actor, new: Actor) -> list[str]:
    """Return how a device differs from the rows, and from a new device of the same user."""
    mirror, user_id = device.mirror, device.account.id
    await device.settle(lambda _: 0)
    found = [f"{count} {kind} events" for kind, count in mirror.wrong.items()]
    if device.noticed_losses:
        found.append("a heartbeat revealed a lost event")
    there = await truth.memberships(db, user_id)
    if there != mirror.copies.keys():
        return [*found, f"participates in {there}, and not in {set(mirror.copies)}"]
    for one, copy in list(mirror.copies.items()):
        stored = await truth.read_conversation(db, one)
        found += [f"version {version} did not arrive" for version in sorted(copy.missing)]
        found += truth.differences(copy, stored)
        if mirror.preferences[one] != new.mirror.preferences.get(one):
            found.append(f"{mirror.preferences[one]} is {new.mirror.preferences.get(one)}")
    found += [f"{one} differs" for one in truth.own_of(mirror) ^ await truth.own(db, user_id)]
    found += [
        f"{name} {getattr(mirror, name)} is {getattr(new.mirror, name)}"
        for name in ("me", "relationships", "follows", "scheduled")
        if getattr(mirror, name) != getattr(new.mirror, name)
    ]
    found += await _unlike_states(db, device, new)
    return [f"a device of {device.account.name}: {one}" for one in found]


async def _unlike_states(db: Db, device: Actor, new: Actor) -> list[str]:
    """Return how the last states that a device received differ from the rows, and from what a new device reads."""
    states = device.mirror.states.values()
    about = [one.subject[0] for one in states if isinstance(one, server.PresenceChanged | server.UserUpdated)]
    if about:
        wanted = list(dict.fromkeys(UserId(one) for one in about))
        users = (await new.ask(client.GetUsers(user_ids=wanted), server.UserList)).users
        presences = (await new.ask(client.Watch(user_ids=wanted), server.PresenceList)).presences
    else:
        users, presences = [], []
    faces = {one.id: one for one in users}
    statuses = {one.user_id: (one.status, one.custom_status) for one in presences}
    found = []
    for event in states:
        match event:
            case server.MessageRead(conversation_id=one, user_id=reader) if one in device.mirror.copies:
                stored = await truth.read_position(db, one, reader)
                if stored not in {None, event.revision}:
                    found.append(f"{reader} has read up to {stored}, and not up to {event.revision}")
            case server.UserUpdated(user=user) if faces.get(user.id, user) != user:
                found.append(f"{user} is {faces[user.id]}")
            case server.PresenceChanged(presence=one):
                shown = (one.status, one.custom_status)
                if statuses.get(one.user_id, shown) != shown:
                    found.append(f"{one} is {statuses[one.user_id]}")
            case _:
                pass
    return found


class Run:
    """Crews that act out pairs concurrently."""

    def __init__(self, chosen: Sequence[FramePair], proof: PairsProof) -> None:
        self._proof = proof
        self._left = list(chosen)
        random.Random(proof.seed).shuffle(self._left)

    async def act(
        self,
        crews: int,
        new_crew: Callable[[], Awaitable[Crew]],
        *,
        connect: Callable[[], Awaitable[Db]],
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        """Act out all pairs, with that many crews at a time. `connect` connects to the server's database. `tick` is
        called after each pair.
        """
        async with asyncio.TaskGroup() as acting:
            for _ in range(crews):
                acting.create_task(self._act(new_crew, connect, tick))

    async def _act(
        self, new_crew: Callable[[], Awaitable[Crew]], connect: Callable[[], Awaitable[Db]], tick: Callable[[], None]
    ) -> None:
        db = await connect()
        try:
            while self._left:
                crew = await new_crew()
                await crew.connect()
                for _ in range(min(PAIRS_PER_CREW, len(self._left))):
                    if self._left:
                        await crew.act(self._left.pop(), self._proof, db)
                        tick()
                await crew.leave()
        finally:
            await db.close()
