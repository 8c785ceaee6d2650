"""The table of frames that change something, each with the values that one side of a pair sends."""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Literal

from protocol import client
from protocol.client import Frame
from protocol.ids import UserId
from protocol.values import PresenceStatus
from prove.actor import EMOJI
from prove.scene import REPEATS, Side

ROLES: tuple[Literal["moderator", "member", "guest"], ...] = ("moderator", "member", "guest")
STATUSES: tuple[PresenceStatus, ...] = ("busy", "invisible", "online")
PUSH_POINT = "BCVxsr7N_eNgVRqvHtD0zTZsEc6-VV-JvLexhqUzORcxaOzi6-AYWXvTBHm4bjyPjs7Vd8pZGH6SRpkNtoIAiw4"
"""A public key of a browser (RFC 8291, section 5)."""

Make = Callable[[Side, int], Frame]
"""Returns the frame of a side for one of `REPEATS` turns."""


def _index(side: Side, turn: int) -> int:
    """Return an index below `REPEATS`. The two sides send the same values in different orders."""
    return (turn + side.number) % REPEATS


def _text(side: Side, turn: int) -> str:
    return f"Text {side.number}.{turn}"


def _send(side: Side, turn: int) -> Frame:
    """Return a message, a reply to the same message, and a reply in the conversation. Devices of one user repeat it."""
    scene = side.scene
    return client.Send(
        conversation_id=scene.group,
        message_id=scene.sent[turn],
        content=f"Sent {turn} by <@{side.me}>",
        parent_message_id=scene.messages[0] if turn else None,
        also_in_conversation=turn > 1,
    )


def _create_group(side: Side, turn: int) -> Frame:
    return client.CreateGroup(
        conversation_id=side.scene.new[turn], title="The same", participants=[side.other, side.scene.outsider]
    )


def _schedule(side: Side, turn: int) -> Frame:
    return client.Schedule(
        conversation_id=side.scene.group,
        message_id=side.scene.sent[-1],
        content=_text(side, turn),
        send_at=datetime.now(UTC) + timedelta(days=1),
    )


def _endpoint(side: Side, turn: int) -> str:
    """Return the endpoint of one browser. The server refuses to connect to its address."""
    return f"https://127.0.0.1/{side.scene.group}/{turn}"


WRITES: Mapping[type[Frame], Make] = {
    # conversations
    client.CreateDirect: lambda side, _: client.CreateDirect(user_id=side.other),
    client.CreateGroup: _create_group,
    client.CreateChannel: lambda side, turn: client.CreateChannel(
        conversation_id=side.scene.new[turn], title="The same", is_public=True
    ),
    client.UpdateConversation: lambda side, turn: client.UpdateConversation(
        conversation_id=side.scene.group, title=_text(side, turn)
    ),
    client.DeleteConversation: lambda side, _: client.DeleteConversation(conversation_id=side.scene.group),
    client.SetPreferences: lambda side, turn: client.SetPreferences(
        conversation_id=side.scene.group, pin_order=2 * turn + side.number, is_muted=_index(side, turn) == 1
    ),
    # participants
    client.Join: lambda side, _: client.Join(conversation_id=side.scene.group),
    client.Leave: lambda side, _: client.Leave(conversation_id=side.scene.group),
    client.AddParticipants: lambda side, turn: client.AddParticipants(
        conversation_id=side.scene.group, participants=[side.subject, side.scene.outsider][: 1 + turn]
    ),
    client.Invite: lambda side, turn: client.Invite(
        conversation_id=side.scene.group, participants=[side.subject, side.scene.outsider][: 1 + turn]
    ),
    client.Decline: lambda side, _: client.Decline(conversation_id=side.scene.group),
    client.SetInviteCode: lambda side, turn: client.SetInviteCode(conversation_id=side.scene.group, is_open=turn != 1),
    client.RemoveParticipant: lambda side, turn: client.RemoveParticipant(
        conversation_id=side.scene.group, user_id=side.subject, ban=turn > 1
    ),
    client.Unban: lambda side, _: client.Unban(conversation_id=side.scene.group, user_id=side.subject),
    client.SetRole: lambda side, turn: client.SetRole(
        conversation_id=side.scene.group, user_id=side.subject, role=ROLES[_index(side, turn)]
    ),
    client.SetPermissions: lambda side, turn: client.SetPermissions(
        conversation_id=side.scene.group, user_id=side.subject, can_pin_messages=_index(side, turn) == 1
    ),
    client.TransferOwnership: lambda side, _: client.TransferOwnership(
        conversation_id=side.scene.group, user_id=side.other
    ),
    # messages
    client.Send: _send,
    client.Forward: lambda side, turn: client.Forward(
        **side.scene.at, to_conversation_id=side.scene.group, new_message_id=side.scene.sent[turn]
    ),
    client.Edit: lambda side, turn: client.Edit(**side.scene.at, content=_text(side, turn)),
    client.Delete: lambda side, turn: client.Delete(
        conversation_id=side.scene.group, message_id=side.scene.messages[-1 - turn]
    ),
    client.React: lambda side, turn: client.React(**side.scene.at, emoji=EMOJI[_index(side, turn)]),
    client.Unreact: lambda side, turn: client.Unreact(**side.scene.at, emoji=EMOJI[turn]),
    client.Pin: lambda side, _: client.Pin(**side.scene.at),
    client.Unpin: lambda side, _: client.Unpin(**side.scene.at),
    client.Star: lambda side, _: client.Star(**side.scene.at),
    client.Unstar: lambda side, _: client.Unstar(**side.scene.at),
    client.Vote: lambda side, turn: client.Vote(
        conversation_id=side.scene.group, message_id=side.scene.poll, options=[_index(side, turn)]
    ),
    client.ClosePoll: lambda side, _: client.ClosePoll(conversation_id=side.scene.group, message_id=side.scene.poll),
    # threads
    client.FollowThread: lambda side, _: client.FollowThread(**side.scene.at),
    client.UnfollowThread: lambda side, _: client.UnfollowThread(**side.scene.at),
    client.ReadThread: lambda side, turn: client.ReadThread(**side.scene.at, thread_order=turn),
    # receipts
    client.Read: lambda side, turn: client.Read(
        conversation_id=side.scene.group, message_id=side.scene.messages[_index(side, turn)]
    ),
    client.Delivered: lambda side, turn: client.Delivered(
        conversation_id=side.scene.group, message_id=side.scene.messages[_index(side, turn)]
    ),
    client.MarkUnread: lambda side, turn: client.MarkUnread(
        conversation_id=side.scene.group, message_id=side.scene.messages[_index(side, turn)]
    ),
    # drafts and scheduled messages
    client.SetDraft: lambda side, turn: client.SetDraft(
        conversation_id=side.scene.group, content=_text(side, turn) if turn != 1 else ""
    ),
    client.Schedule: _schedule,
    client.CancelScheduled: lambda side, _: client.CancelScheduled(
        conversation_id=side.scene.group, message_id=side.scene.sent[-1]
    ),
    # notifications
    client.SeeFeed: lambda _, __: client.SeeFeed(),
    client.RegisterPush: lambda side, turn: client.RegisterPush(
        endpoint=_endpoint(side, turn), p256dh=PUSH_POINT, auth="BTBZMqHH6r4Tts7J_aSIgg"
    ),
    client.UnregisterPush: lambda side, turn: client.UnregisterPush(endpoint=_endpoint(side, turn)),
    # moderation
    client.Moderate: lambda side, _: client.Moderate(**side.scene.at, reason="Rude"),
    client.Unmoderate: lambda side, _: client.Unmoderate(**side.scene.at),
    client.ReportMessage: lambda side, turn: client.ReportMessage(
        conversation_id=side.scene.group, message_id=side.scene.messages[turn], reason="Rude"
    ),
    client.DismissReport: lambda side, _: client.DismissReport(
        conversation_id=side.scene.group, report_id=side.scene.report
    ),
    # people
    client.SetPresence: lambda side, turn: client.SetPresence(
        status=STATUSES[_index(side, turn)], custom_status=_text(side, turn)
    ),
    client.UpdateProfile: lambda side, turn: client.UpdateProfile(
        name=f"Pair {side.number}.{turn}", is_private=_index(side, turn) == 1
    ),
    # relationships
    client.RequestFriend: lambda side, _: client.RequestFriend(user_id=side.other),
    client.AnswerFriend: lambda side, turn: client.AnswerFriend(user_id=side.other, accept=turn != 1),
    client.Unfriend: lambda side, _: client.Unfriend(user_id=side.other),
    client.Block: lambda side, _: client.Block(user_id=side.other),
    client.Unblock: lambda side, _: client.Unblock(user_id=side.other),
    client.Follow: lambda side, _: client.Follow(user_id=side.other),
    client.Unfollow: lambda side, _: client.Unfollow(user_id=side.other),
    client.Mute: lambda side, _: client.Mute(user_id=side.other),
    client.Unmute: lambda side, _: client.Unmute(user_id=side.other),
    client.SetSwitches: lambda side, turn: client.SetSwitches(user_id=side.other, can_send_messages=turn % 2 == 0),
}
"""Every frame that changes rows."""

OF_ADMIN = {client.Edit, client.Join, client.Decline, client.Leave, client.SetDraft}
"""Frames that two devices of the admin send, because the owner's would be refused or end the scene. Other pairs of one
user are sent by two devices of the owner.
"""


UNDONE: Mapping[type[Frame], Make] = {
    client.Unreact: lambda side, _: client.React(**side.scene.at, emoji=EMOJI[0]),
    client.Unpin: WRITES[client.Pin],
    client.Unstar: WRITES[client.Star],
    client.UnfollowThread: WRITES[client.FollowThread],
    client.CancelScheduled: WRITES[client.Schedule],
    client.Unfollow: WRITES[client.Follow],
    client.Unmute: WRITES[client.Mute],
    client.Unblock: WRITES[client.Block],
    client.UnregisterPush: WRITES[client.RegisterPush],
    client.SetSwitches: WRITES[client.Follow],
    client.Unban: lambda side, _: client.RemoveParticipant(
        conversation_id=side.scene.group, user_id=side.subject, ban=True
    ),
}
"""Frames that each sender must send first, so that their frame has something to undo."""


def before(kind: type[Frame], side: Side) -> list[tuple[UserId, Frame]]:
    """Return the frames that must precede a frame so that it has an effect, each with its sender."""
    scene, me, group = side.scene, side.me, side.scene.group
    frames: list[tuple[UserId, Frame]] = []
    if kind in UNDONE:
        frames.append((me, UNDONE[kind](side, 0)))
    elif kind is client.AnswerFriend:
        frames.append((side.other, client.RequestFriend(user_id=me)))
    elif kind is client.Unmoderate:
        frames.append((scene.owner, WRITES[client.Moderate](side, 0)))
    elif kind in {client.Join, client.Decline} and me == scene.admin:
        frames.append((me, client.Leave(conversation_id=group)))
        if kind is client.Decline:
            frames.append((scene.owner, client.Invite(conversation_id=group, participants=[me])))
    return frames
