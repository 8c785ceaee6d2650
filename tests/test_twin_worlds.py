"""A viewer cannot tell whether another user blocks or mutes them, or hides that they are online.

Worlds that differ only in that give the same answers to every frame, and the same events, initial state, resume,
export and notifications.
"""

import difflib
from collections.abc import AsyncIterator, Awaitable, Callable

import msgspec
import pytest

from protocol import client
from protocol.ids import UserId, uuid7
from server.core.config import Settings
from server.domain import presence
from server.gateway.dispatch import Rate
from server.hub.receipts import MissedReceipts
from server.limits import load_shedding
from server.routes import ROUTES
from tests.twins import COMPANION, VIEWER, WORDS, XAVER, Twin
from tests.world import UserSession, World, http_client

Fact = Callable[[Twin], Awaitable[None]]


@pytest.fixture
async def world(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    # The worker sends positions again shortly after its start, which is in the first world only.
    monkeypatch.setattr(MissedReceipts, "lost", lambda _: None)
    monkeypatch.setattr(presence, "OFFLINE_SECONDS", 0.05)
    monkeypatch.setattr(presence, "FLUSH_SECONDS", 0.01)
    # No frame is shed on a busy machine.
    monkeypatch.setattr(load_shedding, "LATE_SECONDS", (60, 60, 60))
    async with World(settings, workers=1) as world:
        yield world


async def test_every_frame_is_compared(world: World) -> None:
    twin = Twin(world, "é0")
    await twin.begin(have_met=True, are_friends=False)
    reads, writes = ({type(frame) for frame in frames} for frames in (twin.reads(), twin.writes()))
    assert reads | writes == set(ROUTES)
    assert reads == {frame for frame, route in ROUTES.items() if route.rate in {Rate.READ, Rate.SEARCH}}


# ----------------------------------------------------------------------------------------------------- presence


async def goes(twin: Twin) -> None:
    await twin.leave()


async def goes_invisible(twin: Twin) -> None:
    assert twin.xaver is not None
    await twin.xaver.call(client.SetPresence(status="invisible"))
    await twin.behave("away")


async def hides_and_goes(twin: Twin) -> None:
    assert twin.xaver is not None
    await twin.xaver.call(client.UpdateProfile(show_online_status=False))
    await twin.leave()


async def hides_and_stays(twin: Twin) -> None:
    assert twin.xaver is not None
    await twin.xaver.call(client.UpdateProfile(show_online_status=False))
    await twin.behave()


# -------------------------------------------------------------------------------------------------- relationships


async def blocks(twin: Twin) -> None:
    assert twin.xaver is not None
    await twin.xaver.call(client.Block(user_id=twin.id(VIEWER)))
    await twin.behave()
    await twin.act()


async def parts(twin: Twin) -> None:
    """End the friendship, and Xaver's other relationships."""
    assert twin.xaver is not None
    await twin.xaver.ask(client.Unfriend(user_id=twin.id(VIEWER)))
    await twin.xaver.ask(client.Unfollow(user_id=twin.id(VIEWER)))


async def is_private(twin: Twin) -> None:
    assert twin.xaver is not None
    await parts(twin)
    await twin.xaver.call(client.UpdateProfile(is_private=True, show_online_status=False, allow_friend_requests=False))
    await twin.behave()
    await twin.act()


async def is_private_to_strangers(twin: Twin) -> None:
    assert twin.xaver is not None
    await parts(twin)
    await twin.xaver.call(client.UpdateProfile(is_private=True, allow_friend_requests=False))
    await twin.behave()
    await twin.act()


async def deactivates(twin: Twin) -> None:
    async with http_client(twin.world.url) as http:
        headers = {"authorization": f"Bearer {twin.users[XAVER].token}"}
        answer = await http.post("/v1/auth/deactivate", headers=headers, json={"password": WORDS})
    assert answer.status_code == 204
    twin.xaver = None
    await twin.settle()


async def switches_off(twin: Twin) -> None:
    """Switch off everything short of a block for the viewer, without an event to them."""
    assert twin.xaver is not None
    await parts(twin)
    await twin.xaver.call(client.Mute(user_id=twin.id(VIEWER)))
    await twin.xaver.call(client.SetSwitches(
        user_id=twin.id(VIEWER), can_see_online_status=False, can_send_messages=False, can_see_profile=False,
        notifications_enabled=False,
    ))  # fmt: skip
    await twin.xaver.call(client.UpdateProfile(is_private=True, allow_friend_requests=False))
    await twin.behave()
    await twin.act()


async def is_open(twin: Twin) -> None:
    await twin.behave()
    await twin.act()


async def mutes(twin: Twin) -> None:
    assert twin.xaver is not None
    await twin.xaver.call(client.Mute(user_id=twin.id(VIEWER)))
    await twin.xaver.call(client.SetSwitches(user_id=twin.id(VIEWER), notifications_enabled=False))
    await is_open(twin)


STRANGERS, MET, FRIENDS = (False, False), (True, False), (True, True)
CASES: dict[str, tuple[tuple[bool, bool], list[Fact], bool]] = {
    "invisible": (MET, [goes, goes_invisible], True),
    "invisible stranger": (STRANGERS, [goes, goes_invisible], True),
    "hides": (MET, [hides_and_goes, hides_and_stays], True),
    "mutes": (MET, [is_open, mutes], True),
    "blocks, seen": (MET, [is_private, blocks], False),
    "blocks": (MET, [switches_off, blocks], True),
    "a friend blocks": (FRIENDS, [switches_off, blocks], True),
    "a stranger blocks": (STRANGERS, [is_private_to_strangers, blocks, deactivates], True),
}
"""For each case: the relationship of the two, the facts that must look alike, and whether writes are compared, too."""
SLOW = {"invisible stranger", "blocks", "blocks, seen", "a stranger blocks", "mutes"}


@pytest.mark.parametrize("case", [pytest.param(one, marks=pytest.mark.long if one in SLOW else ()) for one in CASES])
async def test_worlds_that_differ_in_a_hidden_fact_look_the_same(world: World, case: str) -> None:
    (have_met, are_friends), facts, writes = CASES[case]
    twins = []
    for number, fact in enumerate(facts):
        twin = Twin(world, f"é{number}")
        await twin.begin(have_met=have_met, are_friends=are_friends)
        await fact(twin)
        await twin.collect(writes=writes)
        twins.append(twin)
    first, *others = twins
    for fact, other in zip(facts[1:], others, strict=True):
        wrong = {
            kind: list(difflib.unified_diff(told, other.received[kind], facts[0].__name__, fact.__name__, n=0))
            for kind, told in first.received.items()
            if told != other.received[kind]
        }
        assert not wrong, "\n".join(f"{kind}:\n" + "\n".join(lines) for kind, lines in wrong.items())


# --------------------------------------------------------------------------------------------------- invitations


async def only_blocks(twin: Twin) -> None:
    assert twin.xaver is not None
    await twin.xaver.call(client.Block(user_id=twin.id(VIEWER)))


async def only_is_private(twin: Twin) -> None:
    assert twin.xaver is not None
    await parts(twin)
    await twin.xaver.call(client.UpdateProfile(is_private=True))


async def only_switches_off(twin: Twin) -> None:
    assert twin.xaver is not None
    await parts(twin)
    await twin.xaver.call(client.Mute(user_id=twin.id(VIEWER)))
    await twin.xaver.call(client.SetSwitches(user_id=twin.id(VIEWER), can_send_messages=False))


async def blocks_and_allows_no_adding(twin: Twin) -> None:
    assert twin.xaver is not None
    await twin.xaver.call(client.UpdateProfile(allow_adding=False))
    await only_blocks(twin)


UNINVITABLE: list[Fact] = [only_is_private, only_switches_off, only_blocks, blocks_and_allows_no_adding, deactivates]


def inviting(twin: Twin) -> list[client.Frame]:
    """Return every frame that adds or invites, for Xaver alone and with a companion."""
    frames = [one for one in twin.writes() if hasattr(one, "participants")]
    both = [twin.id(XAVER), twin.id(COMPANION)]
    return [*frames, *(msgspec.structs.replace(one, participants=both) for one in frames)]


async def test_every_frame_that_names_participants_is_compared(world: World) -> None:
    twin = Twin(world, "é0")
    naming = {frame for frame in ROUTES if "participants" in frame.__struct_fields__}
    twin.users = {name: UserSession(UserId(uuid7()), name, "") for name in (VIEWER, XAVER, COMPANION)}
    assert {type(frame) for frame in inviting(twin)} == naming


@pytest.mark.parametrize("anyone_adds", [False, True])
async def test_answers_to_an_invitation_do_not_reveal_a_block(world: World, *, anyone_adds: bool) -> None:
    """All users who cannot be invited give the same answers to those who share a group with them."""
    app = world.workers[0].app
    twins = [Twin(world, f"é{number}") for number in range(len(UNINVITABLE))]
    for twin, fact in zip(twins, UNINVITABLE, strict=True):
        await twin.begin(have_met=True, are_friends=False)
        await fact(twin)
    app._services = msgspec.structs.replace(app._services, anyone_adds=anyone_adds)  # noqa: SLF001
    told: dict[str, list[str]] = {}
    for twin, fact in zip(twins, UNINVITABLE, strict=True):
        again = await world.connect(twin.users[VIEWER])
        await twin.ask(again, "inviting", inviting(twin))
        told[fact.__name__] = twin.received["inviting"]
    assert all(one == told["only_blocks"] for one in told.values()), told
