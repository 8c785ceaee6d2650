"""Drafts: unsent text of users, one per conversation."""

from protocol.client import SetDraft
from protocol.ids import ConversationId, UserId
from protocol.limits import MAX_PAGE
from protocol.server import DraftChanged
from protocol.values import Draft
from server.db.database import Db
from server.db.rows import Page, Reader, Undecoded
from server.queries.cursor import Cursor
from server.queries.moment import MOMENT
from server.queries.users import MOVE_OWN

_draft_decoder = Reader(Draft)

# The user is locked before the user's rows, as everywhere.
SET = f"""
WITH here AS (
    SELECT p.conversation_id FROM conversation_participant p
    JOIN conversation c ON c.id = p.conversation_id AND NOT c.is_deleted
    WHERE p.conversation_id = $1 AND p.user_id = $2 AND p.status = 'active'
), touched AS (
    {MOVE_OWN} AND EXISTS (SELECT FROM here) RETURNING version
)
INSERT INTO draft (user_id, conversation_id, content, user_version)
SELECT $2, here.conversation_id, $3, touched.version FROM here, touched
ON CONFLICT (user_id, conversation_id) DO UPDATE SET content = excluded.content, updated_at = now(),
    user_version = excluded.user_version
RETURNING user_version, updated_at
"""  # noqa: S608 - MOVE_OWN is a constant


async def put(db: Db, frame: SetDraft, user_id: UserId) -> DraftChanged | None:
    """Store a draft, which replaces an earlier one. Return None, without an effect, if the user has no access.

    Requires the lock of `conversations.keep`, for which a deletion waits, and the user's lock, which leaving and
    removal take. So no draft outlives the membership.
    """
    row = await db.fetchrow(SET, frame.conversation_id, user_id, frame.content)
    if row is None:
        return None
    version, updated_at = row
    draft = Draft(
        conversation_id=frame.conversation_id, content=frame.content, updated_at=updated_at, user_version=version
    )
    return DraftChanged(user_version=version, draft=draft)


# The row stays, so that the user's other devices are notified.
EMPTY = f"""
WITH touched AS (
    {MOVE_OWN} AND EXISTS (
        SELECT FROM draft d WHERE d.user_id = $2 AND d.conversation_id = $1 AND d.content <> ''
    ) RETURNING version
)
UPDATE draft d SET content = '', updated_at = now(), user_version = t.version FROM touched t
WHERE d.user_id = $2 AND d.conversation_id = $1
"""  # noqa: S608 - MOVE_OWN is a constant


async def empty(db: Db, conversation_id: ConversationId, user_id: UserId) -> None:
    """Empty a user's draft in a conversation. Requires the locks of both."""
    await db.execute(EMPTY, conversation_id, user_id)


# Very many participants may have drafts. So `remains` calls this after a deletion, with the users' locks only.
EMPTY_SOME = """
WITH free AS MATERIALIZED (
    SELECT o.id FROM draft d JOIN "user" o ON o.id = d.user_id
    WHERE d.conversation_id = $1 AND d.content <> ''
    LIMIT $2 FOR NO KEY UPDATE OF o SKIP LOCKED
), touched AS (
    UPDATE "user" u SET version = u.version + 1, own_moves = u.own_moves + 1
    FROM free WHERE u.id = free.id RETURNING u.id, u.version
)
UPDATE draft d SET content = '', updated_at = now(), user_version = t.version FROM touched t
WHERE d.user_id = t.id AND d.conversation_id = $1 AND (d.content <> '') IS TRUE
RETURNING d.user_id
"""


async def empty_some(db: Db, conversation_id: ConversationId, *, limit: int) -> list[UserId]:
    """Empty up to `limit` drafts in a deleted conversation. Return their users. Locked users are skipped."""
    return [UserId(row[0]) for row in await db.fetch(EMPTY_SOME, conversation_id, limit)]


# Drafts are sorted before the user's access is checked, so that this ends with the page.
LIST = f"""
SELECT json_build_object('conversation_id', d.conversation_id, 'content', d.content, 'updated_at', d.updated_at,
        'user_version', d.user_version),
    {MOMENT.format(at="d.updated_at")}, d.conversation_id
FROM (
    SELECT d.* FROM draft d
    WHERE d.user_id = $1 AND d.content <> ''
        AND ($2::timestamptz IS NULL OR (d.updated_at, d.conversation_id) < ($2, $3::uuid))
    ORDER BY d.updated_at DESC, d.conversation_id DESC
) d
CROSS JOIN LATERAL (
    SELECT FROM conversation_participant p JOIN conversation c ON c.id = p.conversation_id AND NOT c.is_deleted
    WHERE p.conversation_id = d.conversation_id AND p.user_id = $1 AND p.status = 'active' OFFSET 0
) here
ORDER BY d.updated_at DESC, d.conversation_id DESC LIMIT {MAX_PAGE + 1}
"""  # noqa: S608 - a column and a number are put in


async def page(db: Db, user_id: UserId, before: Cursor | None) -> Undecoded[Page[Draft]]:
    """Return a page of a user's drafts in conversations of the user, latest first."""
    return _draft_decoder.page(await db.fetch(LIST, user_id, *(before or (None, None))), MAX_PAGE, Cursor.of)
