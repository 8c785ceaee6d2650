"""The matrix of roles: what each may do in a group or a channel, as data. docs/roles.md is made from it."""

from enum import Enum
from typing import NamedTuple

from protocol.values import Participant, Role

ROLES: tuple[Role, ...] = ("guest", "member", "moderator", "admin", "owner")
"""From the lowest to the highest. Nobody changes the part of someone of the same or a higher role."""


class Rule(NamedTuple):
    """The least role that may do something, and the permission that lets a lower one do it, too."""

    what: str
    least: Role
    permission: str | None = None


class Act(Enum):
    """What takes a role."""

    TAKE_PART = Rule("read, react, follow; send, unless `send_role` asks for more; report; leave", "guest")
    SKIP_SLOW_MODE = Rule("send without waiting in slow mode", "moderator")
    PIN_MESSAGES = Rule("pin messages", "moderator", "can_pin_messages")
    BE_LOUD = Rule("mention everyone, everyone who is here, or a role", "moderator")
    DELETE_MESSAGES = Rule("delete other people's messages", "moderator", "can_delete_messages")
    MODERATE = Rule("hide messages and show them again, see what is hidden, review reports", "moderator",
        "can_delete_messages")  # fmt: skip
    ADD_MEMBERS = Rule("add and invite people, see who is invited or banned, see and change the invite code", "admin",
        "can_add_members")  # fmt: skip
    REMOVE_MEMBERS = Rule("remove and ban people, lift bans, see who is invited or banned", "admin",
        "can_remove_members")  # fmt: skip
    EDIT_CONVERSATION = Rule("change title, description, image, settings; archive", "admin", "can_edit_conversation")
    SET_ROLES = Rule("give roles and permissions below one's own", "admin")
    READ_AUDIT = Rule("read the audit log", "admin")
    TRANSFER = Rule("make someone else the owner", "owner")
    DELETE_CONVERSATION = Rule("delete the conversation", "owner")


def rank(role: Role) -> int:
    """Return how high a role is, from 0."""
    return ROLES.index(role)


def may(participant: Participant, act: Act) -> bool:
    """Whether a participant may do something, by role or by permission."""
    rule = act.value
    is_granted = rule.permission is not None and bool(getattr(participant.permissions, rule.permission))
    return participant.status == "active" and (is_granted or rank(participant.role) >= rank(rule.least))
