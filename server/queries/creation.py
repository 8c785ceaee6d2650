"""The creation of conversations, and whether one exists already."""

import msgspec

from protocol.ids import ConversationId, UserId
from protocol.values import ConversationSettings, ConversationType, Role
from server.db.database import Db


class Founding(msgspec.Struct, frozen=True, kw_only=True):
    """A conversation to create, with its first participants."""

    id: ConversationId
    type: ConversationType
    created_by: UserId
    members: dict[UserId, Role]
    invited: frozenset[UserId] = frozenset()
    """Members who are only invited."""
    title: str | None = None
    description: str | None = None
    image: str | None = None
    is_public: bool = False
    invite_code: str | None = None
    max_participants: int | None = None
    settings: ConversationSettings = ConversationSettings()


# Version 1 is the conversation itself, and each participant, active or invited, takes the next one.
CREATE = """
WITH made AS (
    INSERT INTO conversation (id, type, created_by, title, description, is_public, invite_code, max_participants,
        settings, direct_low, direct_high, participant_count, settings_version, version, access_version, image)
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, cardinality(array_positions($15::text[], 'active')), 1,
        1 + cardinality($12::uuid[]), 1 + cardinality($12::uuid[]), $14)
    ON CONFLICT DO NOTHING
    RETURNING id
), joined AS (
    INSERT INTO conversation_participant (conversation_id, user_id, role, status, invited_by, version, joined_version,
        last_read_version)
    SELECT made.id, m.user_id, m.role, m.status, nullif($3, m.user_id), 1 + m.place,
        CASE m.status WHEN 'active' THEN 1 + m.place ELSE 0 END,
        CASE m.status WHEN 'active' THEN 1 + cardinality($12::uuid[]) ELSE 0 END
    FROM made, unnest($12::uuid[], $13::text[], $15::text[]) WITH ORDINALITY AS m (user_id, role, status, place)
)
SELECT EXISTS (SELECT FROM made)
"""


async def create(db: Db, founding: Founding) -> bool:
    """Create a conversation. Return False if its id or its pair of users is taken."""
    pair = sorted(founding.members) if founding.type == "direct" else [None, None]
    return bool(
        await db.fetchval(
            CREATE,
            founding.id,
            founding.type,
            founding.created_by,
            founding.title,
            founding.description,
            founding.is_public,
            founding.invite_code,
            founding.max_participants,
            msgspec.json.encode(founding.settings).decode(),
            *pair,
            list(founding.members),
            list(founding.members.values()),
            founding.image,
            ["invited" if member in founding.invited else "active" for member in founding.members],
        )
    )


# The conversation as created, with the participants whom its creator added, whatever their status is now. They are
# compared only if the creator sees all participants (`sees_participant`). Otherwise the result would reveal who is
# invited or banned. For a creator who left, all copies are equal, so that the answer is `not_found`.
IS_SAME = """
SELECT c.created_by = $2 AND (me.user_id IS NULL OR (c.type = $3 AND (c.settings_version > 1 OR (
        c.title = $4 AND c.description IS NOT DISTINCT FROM $5 AND c.is_public = $6
        AND c.max_participants IS NOT DISTINCT FROM $7 AND c.settings = $8::jsonb AND c.image IS NOT DISTINCT FROM $10
    )) AND NOT (can(me.role, 'admin', me.can_add_members OR me.can_remove_members) AND EXISTS (
        SELECT FROM unnest($9::uuid[]) AS m (user_id) WHERE NOT EXISTS (
            SELECT FROM conversation_participant p WHERE p.conversation_id = c.id AND p.user_id = m.user_id OFFSET 0
        )
    ))))
FROM conversation c
LEFT JOIN conversation_participant me ON me.conversation_id = c.id AND me.user_id = $2 AND me.status = 'active'
WHERE c.id = $1
"""


async def is_same(db: Db, founding: Founding) -> bool:
    """Whether the conversation with this id is the result of the same frame."""
    settings = msgspec.json.encode(founding.settings).decode()
    return bool(
        await db.fetchval(
            IS_SAME, founding.id, founding.created_by, founding.type, founding.title, founding.description,
            founding.is_public, founding.max_participants, settings, list(founding.members), founding.image,
        )
    )  # fmt: skip


DIRECT = "SELECT id FROM conversation WHERE direct_low = least($1::uuid, $2) AND direct_high = greatest($1::uuid, $2)"


async def direct(db: Db, one: UserId, other: UserId) -> ConversationId | None:
    """Return the direct conversation of two users."""
    return ConversationId(found) if (found := await db.fetchval(DIRECT, one, other)) else None
