"""Changes of a user's own rows, as events."""

from typing import NamedTuple

from protocol.ids import UserId
from protocol.server import OwnEvent, OwnStartOverReason
from server.db.database import Db
from server.db.rows import Reader, Undecoded

_own_decoder = Reader(OwnEvent)

# Changes of the user's own rows after the user version $2, as events, the first $3 of them. Each kind uses its own
# index.
READ = """
SELECT u.version, u.forgotten_version, news.version, news.event FROM "user" u LEFT JOIN LATERAL (
    SELECT u.own_version AS version, json_build_object('type', 'me_changed', 'user_version', u.own_version,
        'me', me_json(u)) AS event
    WHERE u.own_version > $2
    UNION ALL
    (SELECT r.from_version, json_build_object('type', 'relationship_changed', 'user_version', r.from_version,
        'relationship', relationship_json(r, u.id))
    FROM user_relationship r WHERE r.from_user_id = u.id AND r.from_version > $2 AND r.from_version > 0
    ORDER BY r.from_version LIMIT $3)
    UNION ALL
    (SELECT r.to_version, json_build_object('type', 'relationship_changed', 'user_version', r.to_version,
        'relationship', relationship_json(r, u.id))
    FROM user_relationship r WHERE r.to_user_id = u.id AND r.to_version > $2 AND r.to_version > 0
        AND r.type IN ('friend', 'follow')
    ORDER BY r.to_version LIMIT $3)
    UNION ALL
    (SELECT p.user_version, CASE
        WHEN p.status = 'invited' AND c.is_active AND NOT c.is_deleted THEN json_build_object('type', 'invited',
            'user_version', p.user_version, 'invitation', invitation_json(p, c))
        WHEN p.status = 'active' THEN json_build_object('type', 'preferences_changed',
            'user_version', p.user_version, 'conversation_id', c.id, 'preferences', preferences_json(p))
        ELSE json_build_object('type', 'invitation_ended', 'user_version', p.user_version, 'conversation_id', c.id)
        END
    FROM conversation_participant p JOIN conversation c ON c.id = p.conversation_id
    WHERE p.user_id = u.id AND p.user_version > $2 AND p.user_version > 0
    ORDER BY p.user_version LIMIT $3)
    UNION ALL
    (SELECT s.user_version, json_build_object('type', 'star_changed', 'user_version', s.user_version,
        'star', json_build_object('conversation_id', s.conversation_id, 'message_id', s.message_id,
            'is_removed', s.is_removed, 'starred_at', s.starred_at, 'user_version', s.user_version))
    FROM message_star s WHERE s.user_id = u.id AND s.user_version > $2
    ORDER BY s.user_version LIMIT $3)
    UNION ALL
    (SELECT d.user_version, json_build_object('type', 'draft_changed', 'user_version', d.user_version,
        'draft', json_build_object('conversation_id', d.conversation_id, 'content', CASE WHEN EXISTS (
            SELECT FROM conversation c WHERE c.id = d.conversation_id AND c.is_deleted OFFSET 0
        ) THEN '' ELSE d.content END, 'updated_at', d.updated_at, 'user_version', d.user_version))
    FROM draft d WHERE d.user_id = u.id AND d.user_version > $2 AND d.user_version > 0
    ORDER BY d.user_version LIMIT $3)
    UNION ALL
    (SELECT s.user_version, json_build_object('type', 'scheduled_changed', 'user_version', s.user_version,
        'scheduled', scheduled_json(s))
    FROM scheduled_message s WHERE s.sender_id = u.id AND s.user_version > $2 AND s.user_version > 0
    ORDER BY s.user_version LIMIT $3)
    UNION ALL
    (SELECT t.user_version, json_build_object('type', 'thread_follow_changed', 'user_version', t.user_version,
        'follow', thread_json(t))
    FROM thread_follow t WHERE t.user_id = u.id AND t.user_version > $2 AND t.user_version > 0
    ORDER BY t.user_version LIMIT $3)
    ORDER BY 1 LIMIT $3
) news ON true
WHERE u.id = $1
"""


OWN_PAGE = 500
"""Approximate max changes of own rows that one statement reads."""


class OwnNews(NamedTuple):
    """Changes of a user's own rows up to a user version, and whether these are all. `lost` is the reason if events
    cannot name all deleted rows.
    """

    version: int
    events: list[OwnEvent]
    is_whole: bool
    lost: OwnStartOverReason | None = None


async def read(db: Db, user_id: UserId, since: int, *, limit: int) -> Undecoded[OwnNews]:
    """Return about `limit` changes after a user version, cut where a version ends. After a version that does not exist
    yet, there are none.
    """
    rows = await db.fetch(READ, user_id, since, limit + 1)
    found = [row for row in rows if row[2] is not None]
    version, forgotten = rows[0][:2] if rows else (since, 0)
    is_whole = len(found) <= limit
    lost: OwnStartOverReason | None = "forgotten" if since < forgotten else None
    if since > version:
        version, found, is_whole, lost = 0, [], False, "ahead_of_server"
    elif not is_whole:
        # The last version may have more events than were read.
        version = found[-1][2] - 1
        if version <= since:
            return await read(db, user_id, since, limit=2 * limit)
        found = [row for row in found if row[2] <= version]
    return _own_decoder.each(row[3] for row in found).then(lambda events: OwnNews(version, events, is_whole, lost))
