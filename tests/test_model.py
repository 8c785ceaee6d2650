"""Random users act on each other on two workers, and a model predicts whether each frame succeeds or is refused.

The model knows only the two tables of rules (protocol/roles.py, protocol/privacy.py).
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as trying
from hypothesis import strategies as st

from protocol import client, server
from protocol.client import Frame
from protocol.errors import ErrorCode
from protocol.ids import ConversationId, MessageId, uuid7
from protocol.payloads import Poll
from protocol.privacy import MET, NO, PUBLIC, RULES, STANDINGS, YES
from protocol.roles import ROLES, Act, rank
from protocol.server import Error
from prove.client import Client
from prove.truth import recount
from server.core.config import Settings
from tests.world import UserSession, World, message, sent

PEOPLE = 3
OK, FORBIDDEN, NOT_FOUND, CONFLICT = None, ErrorCode.FORBIDDEN, ErrorCode.NOT_FOUND, ErrorCode.CONFLICT
GIVEN = ("guest", "member", "moderator", "admin")
Code = ErrorCode | None


@dataclass
class Part:
    """The membership of a user in the channel."""

    role: str
    status: str = "active"
    grants: set[str] = field(default_factory=set)
    since: int = 0
    invited_by: int = 0


class Model:
    """The expected state. Users are numbers; the channel is public, and 0 created it."""

    def __init__(self) -> None:
        self.parts: dict[int, Part] = {0: Part("owner")}
        self.private: set[int] = set()
        self.unaddable: set[int] = set()
        """Users who do not allow anyone to add them, not even friends."""
        self.blocks: set[tuple[int, int]] = set()
        self.friends: set[tuple[int, int]] = set()
        self.asked: dict[tuple[int, int], str] = {}
        self.is_over = False
        self.were_loud: set[int] = set()
        self.poll = self.open_poll = MessageId(uuid7())
        """Two polls of the owner, one of which may be closed."""
        self.is_closed = False
        self._moment = 0

    # ------------------------------------------------------------------------------------------ the two tables

    def may(self, who: int, act: Act) -> bool:
        part = self.parts[who]
        is_granted = act.value.permission in part.grants
        return is_granted or ROLES.index(part.role) >= rank(act.value.least)

    def may_see(self, action: str, viewer: int, target: int) -> bool:
        rule = RULES[action]
        names = list(STANDINGS)
        if rule.setting == "allow_adding" and target in self.unaddable:
            return False
        if (target, viewer) in self.blocks:
            cell = rule.cells[names.index("blocked")]
            return cell == YES or (cell == MET and self.is_in(viewer) and self.is_in(target))
        cell = rule.cells[names.index("stranger")]
        if self.is_in(viewer) and self.is_in(target):
            cell = rule.cells[names.index("together")]
        if (viewer, target) in self.friends:
            cell = rule.cells[names.index("friend")]
        if (viewer, target) in self.blocks and rule.cells[names.index("blocking")] == NO:
            cell = NO
        return cell == YES or (cell == PUBLIC and target not in self.private)

    def is_in(self, who: int) -> bool:
        return who in self.parts and self.parts[who].status == "active" and not self.is_over

    def is_below(self, who: int, other: int) -> bool:
        there = self.parts[other]
        is_gone = there.status not in {"active", "invited"}
        return is_gone or ROLES.index(there.role) < ROLES.index(self.parts[who].role)

    # ---------------------------------------------------------------------------------------------- the channel

    def join(self, who: int) -> Code:
        part = self.parts.get(who)
        if self.is_over:
            return NOT_FOUND
        if part is not None and part.status == "banned":
            return FORBIDDEN
        if part is None or part.status != "active":
            role = "guest" if part is not None and part.role == "guest" else "member"
            if part is not None and part.status == "invited":
                # The channel is public, so an invitation that gives no role any more does not prevent joining.
                role = self.invited_as(part) or role
            self._enter(who, role)
        return OK

    def invited_as(self, part: Part) -> str | None:
        """Return the role that an invitation gives now: at most what the inviter may give, or None."""
        if not self.is_in(part.invited_by) or not self.may(part.invited_by, Act.ADD_MEMBERS):
            return None
        if self.may_give(part.invited_by, part.role):
            return part.role
        mine = self.parts[part.invited_by].role
        return mine if mine in {"guest", "member"} else ROLES[ROLES.index(mine) - 1]

    def _enter(self, who: int, role: str) -> None:
        self._moment += 1
        self.parts[who] = Part(role, since=self._moment)

    def leave(self, who: int) -> Code:
        if not self.is_in(who):
            return NOT_FOUND
        part = self.parts[who]
        part.status = "left"
        others = [one for one, there in self.parts.items() if there.status == "active"]
        if not others:
            self.is_over = True
            for one in self.parts.values():
                one.status = "removed" if one.status == "invited" else one.status
        elif part.role == "owner":
            heir = max(others, key=lambda one: (ROLES.index(self.parts[one].role), -self.parts[one].since))
            self.parts[heir].role = "owner"
        return OK

    def may_give(self, who: int, role: str) -> bool:
        mine = self.parts[who].role
        return ROLES.index(role) < ROLES.index(mine) or role == mine in {"guest", "member"}

    def add(self, who: int, other: int, role: str, *, is_invitation: bool) -> Code:  # noqa: PLR0911 - a list of rules
        if not self.is_in(who):
            return NOT_FOUND
        if not self.may(who, Act.ADD_MEMBERS):
            return FORBIDDEN
        if ROLES.index(role) >= ROLES.index(self.parts[who].role) and not role == self.parts[who].role in {
            "guest",
            "member",
        }:
            return FORBIDDEN
        if who != other and not self.may_see("invite", who, other):
            return NOT_FOUND
        part = self.parts.get(other)
        if part is not None and part.status == "banned":
            return CONFLICT if self.may(who, Act.REMOVE_MEMBERS) else FORBIDDEN
        if part is not None and part.status == "active":
            return OK
        # A user who may not be added is invited.
        if not is_invitation and self.may_see("add", who, other):
            self._enter(other, role)
        elif part is None or part.status != "invited" or self.invited_as(part) is None:
            grants = set() if part is None else part.grants
            self.parts[other] = Part(role, "invited", grants, invited_by=who)
        return OK

    def decline(self, who: int) -> Code:
        part = self.parts.get(who)
        if part is None or part.status not in {"invited", "declined"}:
            return NOT_FOUND
        part.status = "declined"
        return OK

    def _other(self, who: int, other: int, act: Act) -> Code:
        if not self.is_in(who):
            return NOT_FOUND
        if not self.may(who, act):
            return FORBIDDEN
        if other not in self.parts:
            return NOT_FOUND
        return OK if self.is_below(who, other) else FORBIDDEN

    def remove(self, who: int, other: int, *, ban: bool) -> Code:
        code = self._other(who, other, Act.REMOVE_MEMBERS)
        if code is not OK:
            return code
        part = self.parts[other]
        if part.status == ("banned" if ban else "removed"):
            return OK
        if part.status not in {"active", "invited"} and not ban:
            return NOT_FOUND
        part.status = "banned" if ban else "removed"
        return OK

    def unban(self, who: int, other: int) -> Code:
        code = self._other(who, other, Act.REMOVE_MEMBERS)
        if code is OK and self.parts[other].status == "banned":
            self.parts[other].status = "removed"
        return code

    def set_role(self, who: int, other: int, role: str) -> Code:
        code = self._other(who, other, Act.SET_ROLES)
        if code is not OK:
            return code
        if self.parts[other].status != "active":
            return NOT_FOUND
        if ROLES.index(role) >= ROLES.index(self.parts[who].role) and not role == self.parts[who].role in {
            "guest",
            "member",
        }:
            return FORBIDDEN
        self.parts[other].role = role
        return OK

    def set_permission(self, who: int, other: int, name: str, *, is_on: bool) -> Code:
        code = self._other(who, other, Act.SET_ROLES)
        if code is not OK:
            return code
        if self.parts[other].status != "active":
            return NOT_FOUND
        (self.parts[other].grants.add if is_on else self.parts[other].grants.discard)(name)
        return OK

    def transfer(self, who: int, other: int) -> Code:
        if not self.is_in(who):
            return NOT_FOUND
        if not self.may(who, Act.TRANSFER):
            return FORBIDDEN
        if who == other:
            return OK
        if other not in self.parts or self.parts[other].status != "active":
            return NOT_FOUND
        self.parts[other].role, self.parts[who].role = "owner", "admin"
        return OK

    def close(self, who: int) -> Code:
        """Close the first poll. Its author may close it in any role."""
        if not self.is_in(who):
            return NOT_FOUND
        if who != 0:
            is_above = self.is_in(0) and ROLES.index(self.parts[0].role) > ROLES.index(self.parts[who].role)
            if not self.may(who, Act.DELETE_MESSAGES) or (is_above and not self.is_closed):
                return FORBIDDEN
        self.is_closed = True
        return OK

    # ---------------------------------------------------------------------------------------------- each other

    def block(self, who: int, other: int, *, is_on: bool) -> Code:
        if not is_on:
            if ("block", who, other) not in self.asked:  # type: ignore[comparison-overlap]
                return NOT_FOUND
            self.blocks.discard((who, other))
            return OK
        if not self.may_see("see_face", who, other):
            return NOT_FOUND
        self.asked["block", who, other] = "once"  # type: ignore[index]
        self.blocks.add((who, other))
        self._part(who, other)
        return OK

    def request(self, who: int, other: int) -> Code:
        if not self.may_see("request_friend", who, other):
            return CONFLICT if (who, other) in self.blocks else NOT_FOUND
        mine, theirs = self.asked.get((who, other)), self.asked.get((other, who))
        if mine == "rejected":
            return CONFLICT
        if mine not in {"pending", "accepted"} and theirs == "pending":
            self._befriend(who, other)
        elif mine != "accepted":
            self.asked[who, other] = "pending"
        return OK

    def answer(self, who: int, other: int, *, accept: bool) -> Code:
        theirs = self.asked.get((other, who))
        if theirs != ("accepted" if accept else "rejected") and theirs not in {"pending", "rejected"}:
            return NOT_FOUND
        if accept and (who, other) in self.blocks:
            return CONFLICT
        if accept:
            self._befriend(who, other)
        else:
            self.asked[other, who] = "rejected"
        return OK

    def unfriend(self, who: int, other: int) -> Code:
        mine = self.asked.get((who, other))
        if mine is None:
            return NOT_FOUND
        self._part(who, other)
        return OK

    def _part(self, who: int, other: int) -> None:
        """End a friendship and a request of the first user."""
        if self.asked.get((who, other)) in {"pending", "accepted"}:
            self.asked[who, other] = "inactive"
        if self.asked.get((other, who)) == "accepted":
            self.asked[other, who] = "inactive"
        self.friends -= {(who, other), (other, who)}

    def _befriend(self, one: int, other: int) -> None:
        for pair in ((one, other), (other, one)):
            self.asked[pair] = "accepted"
            self.friends.add(pair)


GRANTS = (
    "can_add_members", "can_remove_members", "can_edit_conversation", "can_delete_messages", "can_pin_messages",
)  # fmt: skip
KINDS = (
    "join", "join", "leave", "add", "invite", "decline", "remove", "ban", "unban", "set_role", "set_role",
    "permit", "permit", "transfer", "send", "update", "block", "unblock", "request", "answer", "unfriend", "private",
    "unaddable", "profile", "audit", "pin", "close", "vote", "why",
)  # fmt: skip
STEP = st.tuples(
    st.sampled_from(KINDS), st.integers(0, PEOPLE - 1), st.integers(0, PEOPLE - 1), st.sampled_from(GIVEN),
    st.sampled_from(GRANTS), st.booleans(),
)  # fmt: skip
Step = tuple[str, int, int, Literal["admin", "moderator", "member", "guest"], str, bool]


def step_of(  # noqa: C901, PLR0911, PLR0912 - a table of all steps
    model: Model, about: ConversationId, people: list[UserSession], step: Step
) -> tuple[Frame, Code] | None:
    """Return the frame of a step and the expected error code. Return None if the user is the target."""
    kind, who, other, role, grant, flag = step
    place: dict[str, Any] = {"conversation_id": about}
    them = people[other].id
    match kind:
        case "join":
            return client.Join(**place), model.join(who)
        case "leave":
            return client.Leave(**place), model.leave(who)
        case "decline":
            return client.Decline(**place), model.decline(who)
        case "send":
            if model.is_in(who) and model.may(who, Act.BE_LOUD):
                model.were_loud.add(who)
            return message(about, "Words for @everyone"), OK if model.is_in(who) else NOT_FOUND
        case "pin":
            code = NOT_FOUND if not model.is_in(who) else OK if model.may(who, Act.PIN_MESSAGES) else FORBIDDEN
            return client.Pin(**place, message_id=model.poll), code
        case "close":
            return client.ClosePoll(**place, message_id=model.poll), model.close(who)
        case "vote":
            place["message_id"] = model.open_poll
            return client.Vote(**place, options=[int(flag)]), OK if model.is_in(who) else NOT_FOUND
        case "why":
            place["message_id"] = model.poll
            may_ask = model.is_in(who) and (who == 0 or model.may(who, Act.MODERATE))
            return client.Why(**place), NOT_FOUND if not model.is_in(who) else OK if may_ask else FORBIDDEN
        case "update" | "audit":
            act = Act.EDIT_CONVERSATION if kind == "update" else Act.READ_AUDIT
            code = NOT_FOUND if not model.is_in(who) else OK if model.may(who, act) else FORBIDDEN
            return client.UpdateConversation(**place, description=role) if kind == "update" else client.ListAudit(
                **place
            ), code
        case "private":
            (model.private.add if flag else model.private.discard)(who)
            return client.UpdateProfile(is_private=flag), OK
        case "unaddable":
            (model.unaddable.add if flag else model.unaddable.discard)(who)
            return client.UpdateProfile(allow_adding=not flag), OK
        case "transfer":
            return client.TransferOwnership(**place, user_id=them), model.transfer(who, other)
        case "add":
            frame = client.AddParticipants(**place, participants=[them], role=role)
            return frame, model.add(who, other, role, is_invitation=False)
        case "invite":
            invite = client.Invite(**place, participants=[them], role=role)
            return invite, model.add(who, other, role, is_invitation=True)
    if who == other:
        return None
    match kind:
        case "remove" | "ban":
            is_ban = kind == "ban"
            return client.RemoveParticipant(**place, user_id=them, ban=is_ban), model.remove(who, other, ban=is_ban)
        case "unban":
            return client.Unban(**place, user_id=them), model.unban(who, other)
        case "set_role":
            return client.SetRole(**place, user_id=them, role=role), model.set_role(who, other, role)
        case "permit":
            given_now: dict[str, Any] = {grant: flag}
            frame_of = client.SetPermissions(**place, user_id=them, **given_now)
            return frame_of, model.set_permission(who, other, grant, is_on=flag)
        case "block" | "unblock":
            kind_of = client.Block if kind == "block" else client.Unblock
            return kind_of(user_id=them), model.block(who, other, is_on=kind == "block")
        case "request":
            return client.RequestFriend(user_id=them), model.request(who, other)
        case "answer":
            return client.AnswerFriend(user_id=them, accept=flag), model.answer(who, other, accept=flag)
        case "unfriend":
            return client.Unfriend(user_id=them), model.unfriend(who, other)
        case _:
            return client.GetProfile(user_id=them), OK if model.may_see("see_profile", who, other) else NOT_FOUND


@pytest.fixture
async def world(settings: Settings) -> AsyncIterator[World]:
    """Two workers with the default of OPENCHAT_ADD_PEOPLE."""
    async with World(msgspec.structs.replace(settings, add_people=Settings().add_people)) as world:
        yield world


@pytest.mark.long
@given(st.lists(STEP, min_size=150, max_size=200))
@trying(
    max_examples=12,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
async def test_every_answer_follows_the_tables_of_rules(world: World, steps: list[Step]) -> None:
    people = [await world.user(f"Person {number}") for number in range(PEOPLE)]
    clients: list[Client] = [await world.connect(who, number % 2) for number, who in enumerate(people)]
    about = await world.channel(clients[0], is_public=True)
    model = Model()
    poll = Poll(options=["Yes", "No"])
    model.poll, model.open_poll = [await sent(clients[0], about, "Tea?", payload=poll) for _ in range(2)]
    for number, step in enumerate(steps):
        made = step_of(model, about, people, step)
        if made is None:
            continue
        frame, expected = made
        answer = await clients[step[1]].ask(frame)
        code = answer.code if isinstance(answer, Error) else None
        assert code == expected, (number, step, frame, answer)
        while model.is_over and await world.workers[0].app.background.clear_remains():
            pass  # a job that ends invitations
    rows = await world.db.fetch(
        "SELECT user_id, role, status FROM conversation_participant WHERE conversation_id = $1", about
    )
    there = {row[0]: (row[1], row[2]) for row in rows}
    assert there == {people[who].id: (part.role, part.status) for who, part in model.parts.items()}
    assert await recount(world.db) == []
    query = "SELECT DISTINCT sender_id FROM message WHERE conversation_id = $1 AND loud_mentions = '{everyone}'"
    loud = await world.db.fetch(query, about)
    assert {row[0] for row in loud} == {people[who].id for who in model.were_loud}
    # State from events and state that is read again have the same participants, for every participant.
    for who, one in enumerate(clients):
        if model.is_in(who):
            page = await one.call(client.ListParticipants(conversation_id=about), server.ParticipantPage)
            assert {entry.participant.user_id for entry in page.participants} == {
                people[other].id for other in range(PEOPLE) if model.is_in(other)
            }
        await one.close()
