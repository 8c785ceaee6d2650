"""The matrix of privacy: what each user may see of or do to another. docs/privacy.md is generated from it.

`may()` in schema.sql implements the same rules for all queries; a test compares all cells.
"""

from typing import NamedTuple

STANDINGS = {
    "friend": "is a friend of the target",
    "together": "is in the same conversation",
    "stranger": "is anyone else",
    "blocking": "blocks the target",
    "blocked": "is blocked by the target",
}
"""The standings of one user to another. If several apply, the last one counts."""

YES, NO, PUBLIC, SAME, MET = "yes", "no", "if public", "as otherwise", "in a conversation"
"""`if public` means unless the other user has `is_private`. `as otherwise` means that blocking a user does not change
what the caller sees. `in a conversation` means only while both take part in the same conversation.
"""


class Rule(NamedTuple):
    """One row of the matrix: a cell per standing, the target's `setting`, and the `switch` on the target's relationship
    to the caller. Both must allow it, too.
    """

    what: str
    cells: tuple[str, str, str, str, str]
    setting: str | None = None
    switch: str | None = None


RULES: dict[str, Rule] = {
    "see_face": Rule("see name and picture, find by name", (YES, YES, PUBLIC, SAME, MET)),
    "see_profile": Rule("see bio, location, website", (YES, PUBLIC, PUBLIC, SAME, NO), None, "can_see_profile"),
    "see_presence": Rule("see presence and custom status", (YES, YES, PUBLIC, NO, NO),
        "show_online_status", "can_see_online_status"),
    "write": Rule("open a direct conversation, send in it", (YES, YES, PUBLIC, NO, NO), None, "can_send_messages"),
    "invite": Rule("invite to a group or a channel", (YES, PUBLIC, PUBLIC, NO, NO), None, "can_send_messages"),
    "add": Rule("add to a group or a channel without asking", (YES, NO, NO, NO, NO),
        "allow_adding", "can_send_messages"),
    "request_friend": Rule("ask for friendship", (YES, YES, YES, NO, NO), "allow_friend_requests"),
    "follow": Rule("follow", (YES, PUBLIC, PUBLIC, NO, NO)),
}  # fmt: skip
"""The cells are in the order of STANDINGS. Users who deactivated or deleted their account show only their face, and
only to users in the same conversation. Erased users show everyone that they were erased.
"""
