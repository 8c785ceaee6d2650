"""The export of a user's own data: lists of any length in pages, and the rest whole. protocol/export.py defines the
fields.
"""

from typing import Any, NamedTuple
from uuid import UUID

from protocol.ids import UserId
from server.db.database import Db

ROWS_PER_PAGE = 50
"""Rows per page. Messages, drafts and edits may have 10,000 characters each."""

_IS_SHOWN = """EXISTS (
    SELECT FROM conversation c JOIN conversation_participant p ON p.conversation_id = c.id AND p.user_id = $1
    WHERE c.id = m.conversation_id AND NOT c.is_deleted AND p.status = 'active'
        AND m.sent_version > visible_after(c, p)
)"""
"""Whether frames show the message `m` to the user $1 now. For other messages, an export contains only the user's own
actions, and not what others have done since.
"""

# The user's own relationships include what the user sent to others, and not what others did about them. For
# conversations that the user left, the export has neither the reason nor the current title. A deleted conversation
# counts as left.
HEAD = f"""
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
        'message_id', r.message_id, 'reason', r.reason, 'status', (
            SELECT r.status FROM message m WHERE m.id = r.message_id AND {_IS_SHOWN}
        ), 'created_at', r.created_at))
        FROM report r WHERE r.reporter_id = u.id), '[]'),
    'stars', coalesce((SELECT json_agg(json_build_object('conversation_id', s.conversation_id,
        'message_id', s.message_id, 'starred_at', s.starred_at))
        FROM message_star s WHERE s.user_id = u.id AND NOT s.is_removed), '[]'),
    'threads', coalesce((SELECT json_agg(thread_json(t)) FROM thread_follow t WHERE t.user_id = u.id
        AND (t.has_replied OR t.user_version > 0 OR EXISTS (
            SELECT FROM message m WHERE m.id = t.root_id AND {_IS_SHOWN} OFFSET 0
        ))), '[]'),
    'push_endpoints', coalesce((SELECT json_agg(json_build_object('endpoint', e.endpoint, 'created_at', e.created_at))
        FROM push_endpoint e WHERE e.user_id = u.id), '[]')
)::text
FROM "user" u WHERE u.id = $1
"""  # noqa: S608 - only a constant is put in
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
# If another user deleted a message, its content is the one that the deletion kept. Without that, it has expired.
_WORDS_ALONE = """json_populate_record(NULL::message, json_build_object(
    'id', m.id, 'conversation_id', m.conversation_id, 'sender_id', m.sender_id, 'content_type', m.content_type,
    'content', coalesce(taken.content, m.content),
    'formatted_content', CASE WHEN taken IS NULL THEN m.formatted_content ELSE taken.formatted_content END,
    'payload', m.payload, 'metadata', m.metadata, 'system_message_type', m.system_message_type,
    'parent_message_id', m.parent_message_id, 'thread_root_id', m.thread_root_id,
    'thread_order', CASE WHEN m.thread_root_id IS NULL THEN 0 ELSE m.thread_order END,
    'also_in_conversation', m.also_in_conversation, 'quoted_message_id', m.quoted_message_id,
    'forwarded_from_id', m.forwarded_from_id, 'forwarded_sender_id', m.forwarded_sender_id,
    'edited_at', m.edited_at, 'is_deleted', m.is_deleted AND taken IS NULL,
    'deleted_by', CASE WHEN m.deleted_by = m.sender_id THEN m.deleted_by END,
    'deleted_at', CASE WHEN m.deleted_by = m.sender_id THEN m.deleted_at END,
    'sent_version', m.sent_version, 'version', m.sent_version, 'created_at', m.created_at,
    'mentions', ARRAY[]::uuid[], 'loud_mentions', ARRAY[]::text[], 'hashtags', ARRAY[]::text[],
    'reactions', json_build_object(), 'reply_count', 0, 'poll_voters', 0, 'is_pinned', false, 'is_moderated', false
))"""
MESSAGES = f"""
SELECT m.id, CASE WHEN shown.is_shown THEN json_build_object('message', message_json(m),
        'withheld', CASE WHEN m.is_moderated THEN m.content END)
    ELSE json_build_object('message', message_json({_WORDS_ALONE})) END::text,
    EXISTS (SELECT FROM message_edit e WHERE e.message_id = m.id)
FROM message m
CROSS JOIN LATERAL (SELECT {_IS_SHOWN} AS is_shown OFFSET 0) shown
LEFT JOIN LATERAL (
    SELECT e.content, e.formatted_content FROM message_edit e
    WHERE m.is_deleted AND NOT shown.is_shown AND e.message_id = m.id AND e.edited_by <> m.sender_id
    ORDER BY e.version DESC LIMIT 1
) taken ON true
WHERE m.sender_id = $1 AND m.id > $2 ORDER BY m.id LIMIT $3
"""  # noqa: S608 - only constants are put in
# Edits by the sender. The content that another user's deletion kept is part of the message itself if frames do not show
# it.
EDITS = f"""
SELECT e.version, json_build_object('id', e.id, 'content', e.content, 'formatted_content', e.formatted_content,
    'edited_by', e.edited_by, 'edited_at', e.edited_at, 'version', e.version)::text
FROM message_edit e WHERE e.message_id = $2 AND e.version > $3
    AND (e.edited_by = $1 OR EXISTS (SELECT FROM message m WHERE m.id = e.message_id AND {_IS_SHOWN} OFFSET 0))
ORDER BY e.version LIMIT $4
"""  # noqa: S608 - only a constant is put in


class ExportRow(NamedTuple):
    """A row as JSON, and its sort key: an id, or both columns of a key."""

    place: Any
    text: str
    is_edited: bool = False


async def head(db: Db, user_id: UserId) -> str:
    """Return everything except lists of any length, as a JSON object."""
    return str(await db.fetchval(HEAD, user_id))


async def drafts(db: Db, user_id: UserId, after: UUID) -> list[ExportRow]:
    """Return up to `ROWS_PER_PAGE` drafts of a user, by conversation."""
    return [ExportRow(*row) for row in await db.fetch(DRAFTS, user_id, after, ROWS_PER_PAGE)]


async def scheduled(db: Db, user_id: UserId, after: UUID) -> list[ExportRow]:
    """Return up to `ROWS_PER_PAGE` scheduled messages of a user."""
    return [ExportRow(*row) for row in await db.fetch(SCHEDULED, user_id, after, ROWS_PER_PAGE)]


async def reactions(db: Db, user_id: UserId, after: tuple[UUID, str]) -> list[ExportRow]:
    """Return up to `ROWS_PER_PAGE` reactions of a user, by message and emoji."""
    return [ExportRow((row[0], row[1]), row[2]) for row in await db.fetch(REACTIONS, user_id, *after, ROWS_PER_PAGE)]


async def votes(db: Db, user_id: UserId, after: UUID) -> list[ExportRow]:
    """Return up to `ROWS_PER_PAGE` votes of a user."""
    return [ExportRow(*row) for row in await db.fetch(VOTES, user_id, after, ROWS_PER_PAGE)]


async def deeds(db: Db, user_id: UserId, after: tuple[UUID, int]) -> list[ExportRow]:
    """Return up to `ROWS_PER_PAGE` entries of audit logs whose actor is a user, by log."""
    return [ExportRow((row[0], row[1]), row[2]) for row in await db.fetch(DEEDS, user_id, *after, ROWS_PER_PAGE)]


async def messages(db: Db, user_id: UserId, after: UUID) -> list[ExportRow]:
    """Return up to `ROWS_PER_PAGE` messages of a user, without their edits."""
    return [ExportRow(*row) for row in await db.fetch(MESSAGES, user_id, after, ROWS_PER_PAGE)]


async def edits(db: Db, user_id: UserId, after: tuple[UUID, int]) -> list[ExportRow]:
    """Return up to `ROWS_PER_PAGE` edits of a user's message after a version, by version."""
    return [ExportRow((after[0], row[0]), row[1]) for row in await db.fetch(EDITS, user_id, *after, ROWS_PER_PAGE)]
