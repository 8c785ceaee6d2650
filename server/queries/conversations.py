"""Conversations: locked, changed, deleted, and found by users who may join them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from protocol.ids import ConversationId, UserId
from protocol.values import Conversation, Participant, ParticipantStatus, PublicConversation
from server.db.database import Db
from server.db.rows import Reader
from server.queries.locks import HAS_PART, LOCK, LOCK_AS, LOCK_AS_WITH_USER
from server.queries.messages import Obstacle

_public_decoder = Reader(PublicConversation)
_conversation_decoder = Reader(Conversation)
_participant_decoder = Reader(Participant)

VERSIONS = "SELECT id, version FROM conversation WHERE id = ANY($1)"


async def versions(db: Db, conversation_ids: Sequence[ConversationId]) -> dict[ConversationId, int]:
    """Return the versions of conversations."""
    return {row[0]: row[1] for row in await db.fetch(VERSIONS, list(conversation_ids))}


class SendAccess(NamedTuple):
    """The number of participants, the obstacle to sending if there is one, and the remaining wait of slow mode in
    milliseconds.
    """

    participant_count: int
    obstacle: Obstacle | None
    wait_ms: int


SEND_ACCESS = """
SELECT c.participant_count, obstacle(c, p), slow_mode_wait(c, p) FROM conversation c
JOIN conversation_participant p ON p.conversation_id = c.id AND p.user_id = $2 AND p.status = 'active'
WHERE c.id = $1 AND NOT c.is_deleted
"""


async def send_access(db: Db, conversation_id: ConversationId, user_id: UserId) -> SendAccess | None:
    """Return whether a user may send in a conversation. Return None if the user does not participate."""
    row = await db.fetchrow(SEND_ACCESS, conversation_id, user_id)
    return None if row is None else SendAccess(*row)


async def lock(db: Db, conversation_id: ConversationId) -> Conversation | None:
    """Lock a conversation until the transaction ends. Later reads in the transaction are current."""
    text = await db.fetchval(LOCK, conversation_id)
    return None if text is None else _conversation_decoder.decode(text)


async def lock_as(
    db: Db, conversation_id: ConversationId, user_id: UserId, status: ParticipantStatus = "active"
) -> Conversation | None:
    """Do the same as `lock` for a participant with this status. For all other users return None without waiting.

    The status may have changed while the statement waited. Read it again under the lock.
    """
    text = await db.fetchval(LOCK_AS, conversation_id, user_id, status)
    return None if text is None else _conversation_decoder.decode(text)


async def lock_as_with_user(
    db: Db, conversation_id: ConversationId, user_id: UserId
) -> tuple[Conversation, bool] | None:
    """Do the same as `lock_as` for an active participant, and then lock the user. Also return whether the account is
    active.
    """
    row = await db.fetchrow(LOCK_AS_WITH_USER, conversation_id, user_id, "active")
    return None if row is None else (_conversation_decoder.decode(row[0]), row[1])


KEEP = f"""
SELECT true FROM conversation c
WHERE c.id = $1 AND NOT c.is_deleted AND {HAS_PART.format(status="'active'")} FOR KEY SHARE
"""  # noqa: S608 - a constant is put in


async def keep(db: Db, conversation_id: ConversationId, user_id: UserId) -> bool:
    """Make `lock_all_out` wait until the transaction ends. Frames that send or change something are not delayed.

    Return False, without a lock, unless the user participates. As for `lock_as`, read that again under the lock.
    """
    return bool(await db.fetchval(KEEP, conversation_id, user_id))


LOCK_ALL_OUT = "SELECT FROM conversation WHERE id = $1 FOR UPDATE"


async def lock_all_out(db: Db, conversation_id: ConversationId) -> None:
    """Wait for every transaction that refers to a conversation, and make new ones wait. Requires the conversation's
    lock.
    """
    await db.execute(LOCK_ALL_OUT, conversation_id)


IS_DELETED = "SELECT is_deleted FROM conversation WHERE id = $1"


async def is_deleted(db: Db, conversation_id: ConversationId) -> bool:
    """Whether a conversation is deleted for everyone. Older versions deleted direct ones, too."""
    return bool(await db.fetchval(IS_DELETED, conversation_id))


UPDATE = """
UPDATE conversation c SET
    title = CASE WHEN $2 ? 'title' THEN $2 ->> 'title' ELSE c.title END,
    description = CASE WHEN $2 ? 'description' THEN $2 ->> 'description' ELSE c.description END,
    is_public = CASE WHEN $2 ? 'is_public' THEN ($2 ->> 'is_public')::boolean ELSE c.is_public END,
    is_archived = CASE WHEN $2 ? 'is_archived' THEN ($2 ->> 'is_archived')::boolean ELSE c.is_archived END,
    max_participants = CASE WHEN $2 ? 'max_participants' THEN ($2 ->> 'max_participants')::integer
        ELSE c.max_participants END,
    settings = CASE WHEN $2 ? 'settings' THEN $2 -> 'settings' ELSE c.settings END,
    image = CASE WHEN $2 ? 'image' THEN $2 ->> 'image' ELSE c.image END,
    version = c.version + 1, settings_version = c.version + 1, updated_at = now(),
    access_version = CASE WHEN $2 ?| '{is_archived,settings}' THEN c.version + 1 ELSE c.access_version END
WHERE c.id = $1
RETURNING conversation_json(c)
"""


async def update(db: Db, conversation_id: ConversationId, changes: dict[str, Any]) -> Conversation:
    """Change the fields in `changes`, and return the conversation. Requires the conversation's lock."""
    patch = msgspec.json.encode(changes).decode()
    return _conversation_decoder.decode(await db.fetchval(UPDATE, conversation_id, patch))


DELETE = """
UPDATE conversation c SET is_deleted = true, is_active = false, invite_code = NULL, updated_at = now(),
    has_remains = true, version = c.version + 1, settings_version = c.version + 1, access_version = c.version + 1
WHERE c.id = $1
RETURNING conversation_json(c)
"""


async def delete(db: Db, conversation_id: ConversationId) -> Conversation:
    """Delete a conversation for everyone, and return its remains. Requires the lock of `lock_all_out`.

    `remains` deletes drafts and invitations later, because there may be very many.
    """
    return _conversation_decoder.decode(await db.fetchval(DELETE, conversation_id))


# The largest come first, because users most likely search for these.
FIND = """
SELECT coalesce(json_agg(json_build_object('conversation_id', c.id, 'type', c.type, 'title', c.title,
    'description', c.description, 'image', c.image, 'participant_count', c.participant_count)), '[]')
FROM (
    SELECT c.* FROM conversation c
    WHERE c.is_public
        AND to_tsvector('simple', unpunctuated(coalesce(c.title, '') || ' ' || coalesce(c.description, '')))
        @@ to_tsquery('simple', $1)
        AND c.is_active AND NOT c.is_archived AND NOT c.is_deleted
    ORDER BY c.participant_count DESC, c.id LIMIT $2
) c
"""


async def find(db: Db, query: str, *, limit: int) -> list[PublicConversation]:
    """Return public conversations that match a query of `search_text.query`."""
    return _public_decoder.every(await db.fetchval(FIND, query, limit))
