"""Who may see or do what to whom, as data. docs/privacy.md is made from it.

`may()` in schema.sql answers by the same rules, for every query; a test compares all cells.
"""

from typing import NamedTuple

STANDINGS = {
    "friend": "is a friend of the target",
    "together": "is in the same conversation",
    "stranger": "is anyone else",
    "blocking": "blocks the target",
    "blocked": "is blocked by the target",
}
"""How the one who asks stands to the other: of those that apply, the last one counts."""

YES, NO, PUBLIC, SAME, MET = "yes", "no", "if public", "as otherwise", "in a conversation"
"""`if public`: unless the other one `is_private`. `as otherwise`: whoever blocks sees what they saw before.
`in a conversation`: only while both take part in the same one.
"""


class Rule(NamedTuple):
    """What one may do by standing, and what of the other's must be true besides: an own setting, and the switch on
    their relationship to the one who asks.
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
"""The cells are in the order of STANDINGS. Of who has deactivated or deleted their account nobody sees more than the
face, and that only together with them; of who is erased everybody sees that.
"""
