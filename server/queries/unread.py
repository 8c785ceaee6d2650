"""What is unread: one definition, for the list of conversations, the badge, and what is pushed.

Past the read position, or from where on somebody marked it unread: messages of others that stand in the conversation
itself, and are neither deleted, nor hidden by a moderator, nor the server's announcements, nor of somebody whom they
block or mute. Who these are is asked once for each conversation, as a query within the query, not for each message.
"""

from collections.abc import Collection

from protocol.ids import UserId
from protocol.limits import MAX_COUNTED
from server.database import Db

COUNT_UNREAD = f"""
SELECT count(*) FILTER (WHERE NOT is_deleted AND NOT is_system_message AND NOT is_moderated
    AND sender_id <> {{me}}.user_id AND NOT sender_id = ANY((SELECT silenced({{me}}.user_id))::uuid[]))
FROM (
    SELECT n.is_deleted, n.is_system_message, n.is_moderated, n.sender_id FROM message n
    WHERE n.conversation_id = {{me}}.conversation_id AND (n.thread_root_id IS NULL OR n.also_in_conversation)
        AND n.sent_version > coalesce({{me}}.unread_from_version - 1, {{me}}.last_read_version)
    ORDER BY n.sent_version DESC LIMIT {MAX_COUNTED}
) newest
"""  # noqa: S608 - a number is put in
"""Of the newest 100 messages past the position, those that count: bounded, however long one was away. `{me}` is the
name of the participant in the query that embeds it, never a value.
"""

COUNT_REPLIES = f"""
SELECT count(*) FILTER (WHERE NOT is_deleted AND NOT is_moderated AND sender_id <> {{me}}.user_id
    AND NOT sender_id = ANY((SELECT silenced({{me}}.user_id))::uuid[]))
FROM (
    SELECT n.is_deleted, n.is_moderated, n.sender_id FROM message n
    WHERE n.thread_root_id = {{me}}.root_id AND n.thread_order > {{me}}.last_read_order
        AND (n.conversation_id = {{me}}.conversation_id) IS TRUE
    ORDER BY n.thread_order DESC LIMIT {MAX_COUNTED}
) newest
"""  # noqa: S608 - a number is put in
"""The same in a thread. `{me}` is the name of the follower."""

# Those where nothing has happened since need no counting.
BADGE = f"""
SELECT me.user_id, coalesce(sum(({COUNT_UNREAD.format(me="me")})), 0)::integer
FROM conversation_participant me JOIN conversation c ON c.id = me.conversation_id AND NOT c.is_deleted
WHERE me.user_id = ANY($1) AND me.status = 'active' AND NOT me.is_hidden
    AND NOT (me.is_muted AND (me.muted_until IS NULL OR me.muted_until > now()))
    AND c.version > coalesce(me.unread_from_version - 1, me.last_read_version)
GROUP BY me.user_id
"""  # noqa: S608 - only the name of a participant is put in


async def badge(db: Db, user_id: UserId) -> int:
    """Return the sum of what is unread in a user's conversations that are neither muted nor hidden."""
    return (await badges(db, {user_id})).get(user_id, 0)


async def badges(db: Db, user_ids: Collection[UserId]) -> dict[UserId, int]:
    """Return the badges of several users; those with nothing unread may be absent."""
    return {row[0]: row[1] for row in await db.fetch(BADGE, list(user_ids))}
