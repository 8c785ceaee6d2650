"""The matrix of roles: what each role may do in a group or a channel. docs/roles.md is generated from it."""

from enum import Enum
from typing import NamedTuple

from protocol.values import Participant, Role

ROLES: tuple[Role, ...] = ("guest", "member", "moderator", "admin", "owner")
"""Roles, from lowest to highest. Nobody can change a participant of the same or a higher role."""


class Rule(NamedTuple):
    """The lowest role that may do something, and the permission that allows a lower role to do it, too."""

    what: str
    least: Role
    permission: str | None = None


class Act(Enum):
    """Actions that require a role."""

    TAKE_PART = Rule("read, react, follow threads, report, leave; send, unless `send_role` is higher", "guest")
    SKIP_SLOW_MODE = Rule("send without waiting in slow mode", "moderator")
    PIN_MESSAGES = Rule("pin messages", "moderator", "can_pin_messages")
    BE_LOUD = Rule("mention `@everyone`, `@here` or a role", "moderator")
    DELETE_MESSAGES = Rule("delete other people's messages", "moderator", "can_delete_messages")
    MODERATE = Rule("hide messages, show them again, read hidden ones, review reports", "moderator",
        "can_delete_messages")  # fmt: skip
    ADD_MEMBERS = Rule("add and invite users, list invited, declined and banned ones, see and change the invite code",
        "admin", "can_add_members")  # fmt: skip
    REMOVE_MEMBERS = Rule("remove and ban users, lift bans, list invited, declined and banned users", "admin",
        "can_remove_members")  # fmt: skip
    EDIT_CONVERSATION = Rule("change title, description, image, settings; archive", "admin", "can_edit_conversation")
    SET_ROLES = Rule("set the roles and permissions of participants with lower roles", "admin")
    READ_AUDIT = Rule("read the audit log", "admin")
    TRANSFER = Rule("transfer the ownership", "owner")
    DELETE_CONVERSATION = Rule("delete the conversation", "owner")


def rank(role: Role) -> int:
    """Return the rank of a role, from 0."""
    return ROLES.index(role)


def may(participant: Participant, act: Act) -> bool:
    """Whether a participant may do something, by role or by permission."""
    rule = act.value
    is_granted = rule.permission is not None and bool(getattr(participant.permissions, rule.permission))
    return participant.status == "active" and (is_granted or rank(participant.role) >= rank(rule.least))
