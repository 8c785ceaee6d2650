"""A person's own data: messages in pages, the rest in one piece. The fields are those of protocol/export.py."""

from protocol.ids import MessageId, UserId
from server.database import Db

PAGE = 500

# What a person sent to others is among their own relationships; what others did about them is not theirs.
HEAD = """
SELECT json_build_object(
    'me', me_json(u),
    'logins', coalesce((SELECT json_agg(json_build_object('provider_id', a.provider_id, 'account_id', a.account_id,
        'created_at', a.created_at)) FROM account a WHERE a.user_id = u.id), '[]'),
    'sessions', coalesce((SELECT json_agg(json_build_object('id', s.id, 'created_at', s.created_at,
        'expires_at', s.expires_at, 'ip_address', s.ip_address, 'user_agent', s.user_agent))
        FROM session s WHERE s.user_id = u.id), '[]'),
    'conversations', coalesce((SELECT json_agg(json_build_object('conversation_id', c.id, 'title', c.title,
        'participant', participant_json(p), 'preferences', preferences_json(p), 'last_read_at', p.last_read_at))
        FROM conversation_participant p JOIN conversation c ON c.id = p.conversation_id WHERE p.user_id = u.id), '[]'),
    'relationships', coalesce((SELECT json_agg(relationship_json(r, u.id))
        FROM user_relationship r WHERE r.from_user_id = u.id), '[]'),
    'reports', coalesce((SELECT json_agg(json_build_object('conversation_id', r.conversation_id,
        'message_id', r.message_id, 'reason', r.reason, 'status', r.status, 'created_at', r.created_at))
        FROM report r WHERE r.reporter_id = u.id), '[]'),
    'stars', coalesce((SELECT json_agg(json_build_object('conversation_id', s.conversation_id,
        'message_id', s.message_id, 'starred_at', s.starred_at))
        FROM message_star s WHERE s.user_id = u.id AND NOT s.is_removed), '[]'),
    'drafts', coalesce((SELECT json_agg(json_build_object('conversation_id', d.conversation_id, 'content', d.content,
        'updated_at', d.updated_at)) FROM draft d WHERE d.user_id = u.id AND d.content <> ''), '[]'),
    'scheduled', coalesce((SELECT json_agg(scheduled_json(s)) FROM scheduled_message s WHERE s.sender_id = u.id), '[]'),
    'votes', coalesce((SELECT json_agg(json_build_object('conversation_id', v.conversation_id,
        'message_id', v.message_id, 'options', v.options, 'voted_at', v.voted_at))
        FROM poll_vote v WHERE v.user_id = u.id AND v.options <> '{}'), '[]'),
    'threads', coalesce((SELECT json_agg(thread_json(t)) FROM thread_follow t WHERE t.user_id = u.id), '[]'),
    'push_endpoints', coalesce((SELECT json_agg(json_build_object('endpoint', e.endpoint, 'created_at', e.created_at))
        FROM push_endpoint e WHERE e.user_id = u.id), '[]'),
    'deeds', coalesce((SELECT json_agg(json_build_object('chain', e.chain, 'number', e.number, 'action', e.action,
        'details', e.details, 'created_at', e.created_at)) FROM audit_entry e WHERE e.actor_id = u.id), '[]')
)::text
FROM "user" u WHERE u.id = $1
"""
REACTIONS = """
SELECT json_build_object('conversation_id', r.conversation_id, 'message_id', r.message_id,
    'emoji', r.emoji, 'created_at', r.created_at)::text
FROM message_reaction r WHERE r.user_id = $1 AND NOT r.is_removed
"""
MESSAGES = """
SELECT m.id, json_build_object(
    'message', message_json(m),
    'withheld', CASE WHEN m.is_moderated THEN m.content END,
    'edits', coalesce((SELECT json_agg(json_build_object('id', e.id, 'content', e.content,
        'formatted_content', e.formatted_content, 'edited_by', e.edited_by, 'edited_at', e.edited_at,
        'version', e.version) ORDER BY e.version) FROM message_edit e WHERE e.message_id = m.id), '[]')
)::text
FROM message m WHERE m.sender_id = $1 AND m.id > $2 ORDER BY m.id LIMIT $3
"""


async def head(db: Db, user_id: UserId) -> str:
    """Return all but the messages and the reactions, as a JSON object."""
    return str(await db.fetchval(HEAD, user_id))


async def reactions(db: Db, user_id: UserId) -> list[str]:
    """Return a user's reactions, each as JSON."""
    return [row[0] for row in await db.fetch(REACTIONS, user_id)]


async def messages(db: Db, user_id: UserId, after: MessageId) -> tuple[list[str], MessageId | None]:
    """Return the next of a user's messages, each as JSON, and after which to go on, if there may be more."""
    rows = await db.fetch(MESSAGES, user_id, after, PAGE)
    return [row[1] for row in rows], MessageId(rows[-1][0]) if len(rows) == PAGE else None
