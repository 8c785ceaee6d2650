"""A person's own data: what may be large in pages, the rest whole. The fields are those of protocol/export.py."""

from typing import Any, NamedTuple
from uuid import UUID

from protocol.ids import UserId
from server.database import Db

PAGE = 50
"""Rows in each piece: messages, drafts and edits may have 10,000 characters each."""

# What a person sent to others is among their own relationships; what others did about them is not theirs. Of where they
# take part no more, it has not why, nor what it is called now. A conversation that was deleted is left by all.
HEAD = """
SELECT json_build_object(
    'me', me_json(u),
    'logins', coalesce((SELECT json_agg(json_build_object('provider_id', a.provider_id, 'account_id', a.account_id,
        'created_at', a.created_at)) FROM account a WHERE a.user_id = u.id), '[]'),
    'sessions', coalesce((SELECT json_agg(json_build_object('id', s.id, 'created_at', s.created_at,
        'expires_at', s.expires_at, 'ip_address', s.ip_address, 'user_agent', s.user_agent))
        FROM session s WHERE s.user_id = u.id), '[]'),
    'conversations', coalesce((SELECT json_agg(json_build_object('conversation_id', c.id,
        'title', CASE WHEN p.status IN ('active', 'invited') AND NOT c.is_deleted THEN c.title END,
        'participant', CASE WHEN c.is_deleted THEN participant_json(p)::jsonb
                || jsonb_build_object('status', 'left', 'version', coalesce(nullif(gone_version(p), 0), p.version))
            WHEN p.status IN ('active', 'invited', 'declined') THEN participant_json(p)::jsonb
            ELSE participant_json(p)::jsonb || jsonb_build_object('status', 'left', 'version', gone_version(p)) END,
        'preferences', preferences_json(p), 'last_read_at', p.last_read_at))
        FROM conversation_participant p JOIN conversation c ON c.id = p.conversation_id
        WHERE p.user_id = u.id AND (p.status IN ('active', 'invited', 'declined') OR gone_version(p) > 0)), '[]'),
    'relationships', coalesce((SELECT json_agg(relationship_json(r, u.id))
        FROM user_relationship r WHERE r.from_user_id = u.id), '[]'),
    'reports', coalesce((SELECT json_agg(json_build_object('conversation_id', r.conversation_id,
        'message_id', r.message_id, 'reason', r.reason, 'status', r.status, 'created_at', r.created_at))
        FROM report r WHERE r.reporter_id = u.id), '[]'),
    'stars', coalesce((SELECT json_agg(json_build_object('conversation_id', s.conversation_id,
        'message_id', s.message_id, 'starred_at', s.starred_at))
        FROM message_star s WHERE s.user_id = u.id AND NOT s.is_removed), '[]'),
    'threads', coalesce((SELECT json_agg(thread_json(t)) FROM thread_follow t WHERE t.user_id = u.id), '[]'),
    'push_endpoints', coalesce((SELECT json_agg(json_build_object('endpoint', e.endpoint, 'created_at', e.created_at))
        FROM push_endpoint e WHERE e.user_id = u.id), '[]')
)::text
FROM "user" u WHERE u.id = $1
"""
REACTIONS = """
SELECT r.message_id, r.emoji, json_build_object('conversation_id', r.conversation_id, 'message_id', r.message_id,
    'emoji', r.emoji, 'created_at', r.created_at)::text
FROM message_reaction r WHERE r.user_id = $1 AND NOT r.is_removed AND (r.message_id, r.emoji) > ($2, $3)
    AND NOT EXISTS (SELECT FROM message m WHERE m.id = r.message_id AND m.is_deleted OFFSET 0)
ORDER BY r.message_id, r.emoji LIMIT $4
"""
VOTES = """
SELECT v.message_id, json_build_object('conversation_id', v.conversation_id, 'message_id', v.message_id,
    'options', v.options, 'voted_at', v.voted_at)::text
FROM poll_vote v WHERE v.user_id = $1 AND v.options <> '{}' AND v.message_id > $2
    AND NOT EXISTS (SELECT FROM message m WHERE m.id = v.message_id AND m.is_deleted OFFSET 0)
ORDER BY v.message_id LIMIT $3
"""
DEEDS = """
SELECT e.chain, e.number, json_build_object('chain', e.chain, 'number', e.number, 'action', e.action,
    'details', e.details, 'created_at', e.created_at)::text
FROM audit_entry e WHERE e.actor_id = $1 AND (e.chain, e.number) > ($2, $3) ORDER BY e.chain, e.number LIMIT $4
"""
DRAFTS = """
SELECT d.conversation_id, json_build_object('conversation_id', d.conversation_id, 'content', d.content,
    'updated_at', d.updated_at)::text
FROM draft d WHERE d.user_id = $1 AND d.content <> '' AND d.conversation_id > $2
    AND NOT EXISTS (SELECT FROM conversation c WHERE c.id = d.conversation_id AND c.is_deleted OFFSET 0)
ORDER BY d.conversation_id LIMIT $3
"""
SCHEDULED = """
SELECT s.id, scheduled_json(s)::text
FROM scheduled_message s WHERE s.sender_id = $1 AND s.id > $2 ORDER BY s.id LIMIT $3
"""
MESSAGES = """
SELECT m.id, json_build_object('message', message_json(m),
    'withheld', CASE WHEN m.is_moderated THEN m.content END)::text,
    EXISTS (SELECT FROM message_edit e WHERE e.message_id = m.id)
FROM message m WHERE m.sender_id = $1 AND m.id > $2 ORDER BY m.id LIMIT $3
"""
EDITS = """
SELECT e.version, json_build_object('id', e.id, 'content', e.content, 'formatted_content', e.formatted_content,
    'edited_by', e.edited_by, 'edited_at', e.edited_at, 'version', e.version)::text
FROM message_edit e WHERE e.message_id = $1 AND e.version > $2 ORDER BY e.version LIMIT $3
"""


class Row(NamedTuple):
    """A row as JSON, and after what to go on: an id, an edit's version, or both columns of a key."""

    place: Any
    text: str
    is_edited: bool = False


async def head(db: Db, user_id: UserId) -> str:
    """Return all that is not large, as a JSON object."""
    return str(await db.fetchval(HEAD, user_id))


async def drafts(db: Db, user_id: UserId, after: UUID) -> list[Row]:
    """Return up to `PAGE` of a user's drafts, in the order of their conversations."""
    return [Row(*row) for row in await db.fetch(DRAFTS, user_id, after, PAGE)]


async def scheduled(db: Db, user_id: UserId, after: UUID) -> list[Row]:
    """Return up to `PAGE` of a user's scheduled messages."""
    return [Row(*row) for row in await db.fetch(SCHEDULED, user_id, after, PAGE)]


async def reactions(db: Db, user_id: UserId, after: tuple[UUID, str]) -> list[Row]:
    """Return up to `PAGE` of a user's reactions, in the order of messages and emoji."""
    return [Row((row[0], row[1]), row[2]) for row in await db.fetch(REACTIONS, user_id, *after, PAGE)]


async def votes(db: Db, user_id: UserId, after: UUID) -> list[Row]:
    """Return up to `PAGE` of a user's votes."""
    return [Row(*row) for row in await db.fetch(VOTES, user_id, after, PAGE)]


async def deeds(db: Db, user_id: UserId, after: tuple[UUID, int]) -> list[Row]:
    """Return up to `PAGE` entries of audit logs that a user is the actor of, in the order of the logs."""
    return [Row((row[0], row[1]), row[2]) for row in await db.fetch(DEEDS, user_id, *after, PAGE)]


async def messages(db: Db, user_id: UserId, after: UUID) -> list[Row]:
    """Return up to `PAGE` of a user's messages, without their edits."""
    return [Row(*row) for row in await db.fetch(MESSAGES, user_id, after, PAGE)]


async def edits(db: Db, message_id: UUID, after: int) -> list[Row]:
    """Return up to `PAGE` of what a message said before, in the order of versions."""
    return [Row(*row) for row in await db.fetch(EDITS, message_id, after, PAGE)]
