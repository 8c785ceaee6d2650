"""The definition of unread messages, for the list of conversations, the badge and push notifications.

Unread messages come after the read position, or begin at the unread mark. They are messages of others in the
conversation itself. Deleted, hidden and system messages do not count, nor do messages of users whom the reader blocks
or mutes.

Blocks and mutes are looked up by key for each message. Otherwise, with thousands of muted users, all of them would be
compared with each message.
"""

from collections.abc import Collection

from protocol.ids import UserId
from protocol.limits import MAX_COUNTED
from server.db.database import Db

SILENCES = """coalesce((
    SELECT true FROM user_relationship s WHERE s.from_user_id = {me} AND s.to_user_id = {them}
        AND s.type IN ('block', 'mute') AND s.status = 'active' LIMIT 1
), false)"""
"""Whether a user blocks or mutes another one. With EXISTS, PostgreSQL would hash all users whom the user silences,
again for each conversation.
"""

_UNREAD = f"""
    SELECT n.is_deleted, n.is_system_message, n.is_moderated, n.sender_id FROM message n
    WHERE n.conversation_id = {{me}}.conversation_id AND (n.thread_root_id IS NULL OR n.also_in_conversation)
        AND n.sent_version > coalesce({{me}}.unread_from_version - 1, {{me}}.last_read_version)
    ORDER BY n.sent_version DESC LIMIT {MAX_COUNTED}
"""  # noqa: S608 - a number is put in
_COUNTED = f"""count(*) FILTER (WHERE NOT is_deleted AND NOT is_system_message AND NOT is_moderated
    AND sender_id <> {{me}}.user_id AND NOT {SILENCES.format(me="{me}.user_id", them="sender_id")})"""
COUNT_UNREAD = f"SELECT {_COUNTED} FROM ({_UNREAD}) newest"  # noqa: S608 - constants
"""The number of unread messages among the newest 100 after the position, which bounds the cost. `{me}` is the name of
the participant in the embedding query, never a value.
"""

_UNREAD_REPLIES = f"""
    SELECT n.is_deleted, n.is_moderated, n.sender_id FROM message n
    WHERE n.thread_root_id = {{me}}.root_id AND n.thread_order > {{me}}.last_read_order
        AND (n.conversation_id = {{me}}.conversation_id) IS TRUE
    ORDER BY n.thread_order DESC LIMIT {MAX_COUNTED}
"""  # noqa: S608 - a number is put in
_COUNTS = f"""NOT newest.is_deleted AND NOT newest.is_moderated AND newest.sender_id <> {{me}}.user_id
    AND NOT {SILENCES.format(me="{me}.user_id", them="newest.sender_id")}"""
COUNT_REPLIES = f"SELECT count(*) FILTER (WHERE {_COUNTS}) FROM ({_UNREAD_REPLIES}) newest"  # noqa: S608 - constants
"""The same in a thread. `{me}` is the name of the follower's row."""
HAS_UNREAD_REPLY = f"EXISTS (SELECT FROM ({_UNREAD_REPLIES}) newest WHERE {_COUNTS})"
"""Whether COUNT_REPLIES is more than 0."""

MAX_IN_BADGE = 100
"""Max conversations in a badge. They are those with changes and the latest activity."""

MAX_BADGE = 1_000
"""Max messages that a badge counts, in the order of these conversations, because it is counted for each
notification.
"""

# Conversations without changes since the read position need no counting.
IS_COUNTED = """NOT me.is_hidden AND NOT (me.is_muted AND (me.muted_until IS NULL OR me.muted_until > now()))
    AND c.version > coalesce(me.unread_from_version - 1, me.last_read_version)"""
"""Whether the badge counts the conversation `c` of the participant `me`."""


def of_conversations(conversations: str, order: str) -> str:
    """Return a query for the number of unread messages in the first `MAX_IN_BADGE` conversations of a query."""
    return f"""
    SELECT {_COUNTED.format(me="newest")}::integer FROM (
        SELECT me.user_id, newest.* FROM (
            {conversations} ORDER BY {order} LIMIT {MAX_IN_BADGE}
        ) me CROSS JOIN LATERAL ({_UNREAD.format(me="me")}) newest LIMIT {MAX_BADGE}
    ) newest
    """  # noqa: S608 - numbers and the name of a participant are put in


_CONVERSATIONS = f"""
    SELECT me.* FROM conversation_participant me
    JOIN conversation c ON c.id = me.conversation_id AND NOT c.is_deleted
    WHERE me.user_id = who.user_id AND me.status = 'active' AND {IS_COUNTED}
"""  # noqa: S608 - a constant is put in
BADGES = f"""
SELECT who.user_id, ({of_conversations(_CONVERSATIONS, "c.last_activity_at DESC, c.id DESC")})
FROM unnest($1::uuid[]) AS who (user_id)
"""  # noqa: S608 - as above


async def badges(db: Db, user_ids: Collection[UserId]) -> dict[UserId, int]:
    """Return the numbers of unread messages in up to 100 conversations of each user, those with changes and the latest
    activity. Muted and hidden ones do not count. Counting stops after `MAX_BADGE` messages. Users without unread
    messages may be missing.
    """
    return {row[0]: row[1] for row in await db.fetch(BADGES, list(user_ids))}
