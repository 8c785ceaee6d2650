"""The matrix of privacy: what each user may see of or do to another. docs/privacy.md is generated from it.

`may()` in schema.sql implements the same rules for all queries; a test compares all cells.
"""

from typing import NamedTuple

STANDINGS = {
    "stranger": "any user",
    "together": "in the same conversation",
    "friend": "friend",
    "blocking": "blocks the target",
    "blocked": "blocked by the target",
}
"""The relations of a caller to a target. If several apply, the last one decides."""

YES, NO, PUBLIC, SAME, MET = "yes", "no", "if public", "unchanged", "if together"
"""`if public` means yes, unless the target has set `is_private`. `unchanged` means that the caller's block has no
effect. `if together` means only while both take part in the same conversation.
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
    "see_face": Rule("see name and picture, find by name", (PUBLIC, YES, YES, SAME, MET)),
    "see_profile": Rule("see bio, location, website", (PUBLIC, PUBLIC, YES, SAME, NO), None, "can_see_profile"),
    "see_presence": Rule("see presence and custom status", (PUBLIC, YES, YES, NO, NO),
        "show_online_status", "can_see_online_status"),
    "write": Rule("open a direct conversation, send in it", (PUBLIC, YES, YES, NO, NO), None, "can_send_messages"),
    "invite": Rule("invite to a group or a channel", (PUBLIC, PUBLIC, YES, NO, NO), None, "can_send_messages"),
    "add": Rule("add to a group or a channel without an invitation", (NO, NO, YES, NO, NO),
        "allow_adding", "can_send_messages"),
    "request_friend": Rule("send a friend request", (YES, YES, YES, NO, NO), "allow_friend_requests"),
    "follow": Rule("follow", (PUBLIC, PUBLIC, YES, NO, NO)),
}  # fmt: skip
"""The cells are in the order of STANDINGS. Users whose account is deactivated, deleted or disabled show only their
face, and only to users in the same conversation. Everyone sees that an erased user was erased.
"""
