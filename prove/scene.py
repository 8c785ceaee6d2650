"""A group of three people, on which two of them act concurrently, and the frames that prepare it."""

from typing import Any, NamedTuple

from protocol import client, server
from protocol.client import Frame
from protocol.ids import ConversationId, MessageId, ReportId, UserId, uuid7
from protocol.payloads import Poll
from prove.actor import Actor

REPEATS = 3
"""How often each side sends its frame, with other values each time."""
PEOPLE = ("Owner", "Admin", "Member", "Outsider")
"""The people of a scene. The owner and the admin act."""


class Scene(NamedTuple):
    """The objects on which the frames of a pair act."""

    owner: UserId
    admin: UserId
    member: UserId
    outsider: UserId
    group: ConversationId
    messages: list[MessageId]
    """Messages of the admin, oldest first. The first is the root of a thread."""
    poll: MessageId
    report: ReportId
    """The member's report about the first message."""
    new: list[ConversationId]
    """Ids that both sides use for conversations that they create."""
    sent: list[MessageId]
    """Ids that both sides use for messages that they send."""

    @property
    def at(self) -> dict[str, Any]:
        """The fields that identify the message on which both sides act."""
        return {"conversation_id": self.group, "message_id": self.messages[0]}


class Side(NamedTuple):
    """One of the two devices that act concurrently. `number` is 0 or 1."""

    scene: Scene
    me: UserId
    number: int

    @property
    def other(self) -> UserId:
        """The other one of the two people."""
        return self.scene.admin if self.me == self.scene.owner else self.scene.owner

    @property
    def subject(self) -> UserId:
        """The participant whom this side may remove, promote and so on."""
        return self.scene.admin if self.me == self.scene.owner else self.scene.member


async def set_up(owner: Actor, admin: Actor, member: Actor, outsider: UserId) -> Scene:
    """Create the group and its messages. Raises Refused if the server refuses that."""
    group = ConversationId(uuid7())
    people = [admin.account.id, member.account.id]
    await owner.ask(client.CreateGroup(conversation_id=group, title="Pairs", participants=people, is_public=True))
    await owner.ask(client.SetRole(conversation_id=group, user_id=admin.account.id, role="admin"))
    messages = [await _say(admin, group) for _ in range(REPEATS)]
    await _say(member, group, parent_message_id=messages[0])
    poll = await _say(admin, group, payload=Poll(options=["Yes", "No", "Later"]))
    await member.ask(client.ReportMessage(conversation_id=group, message_id=messages[0], reason="Rude"))
    reports = await owner.ask(client.ListReports(conversation_id=group), server.ReportPage)
    return Scene(
        owner.account.id, admin.account.id, member.account.id, outsider, group, messages, poll, reports.reports[0].id,
        new=[ConversationId(uuid7()) for _ in range(REPEATS)], sent=[MessageId(uuid7()) for _ in range(2 * REPEATS)],
    )  # fmt: skip


async def clean_up(people: list[Actor]) -> None:
    """Leave all conversations and end blocks, so that the next scene begins like this one."""
    for actor in people:
        for frame in _ending(actor, [one.account.id for one in people if one is not actor]):
            await actor.try_to(frame)


def _ending(actor: Actor, others: list[UserId]) -> list[Frame]:
    frames: list[Frame] = [client.SetPresence(status="online")]
    frames += [client.Unblock(user_id=one) for one in others if _is_blocked(actor, one)]
    for one, copy in actor.mirror.copies.items():
        if copy.conversation.type != "direct":
            frames += [client.DeleteConversation(conversation_id=one), client.Leave(conversation_id=one)]
    return frames


def _is_blocked(actor: Actor, other: UserId) -> bool:
    relationships = actor.mirror.relationships.values()
    return any((one.user_id, one.kind, one.status) == (other, "block", "active") for one in relationships)


async def _say(actor: Actor, group: ConversationId, **fields: Any) -> MessageId:  # noqa: ANN401 - fields of the frame
    made = MessageId(uuid7())
    frame = client.Send(conversation_id=group, message_id=made, content="Hello", **fields)
    await actor.ask(frame, server.Sent)
    return made
