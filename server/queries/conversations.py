"""Conversations: created, changed, and listed as a participant sees them."""

from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

import msgspec

from protocol.ids import ConversationId, MessageId, UserId
from protocol.values import (
    Conversation,
    ConversationSettings,
    ConversationType,
    ConversationView,
    ParticipantStatus,
    PublicConversation,
    Role,
)
from server.db.database import Db
from server.db.rows import Page, Reader, Undecoded, fitting
from server.queries.cursor import Cursor
from server.queries.locks import HAS_PART, LOCK, LOCK_AS
from server.queries.messages import Obstacle
from server.queries.unread import COUNT_UNREAD

_view_decoder = Reader(ConversationView)
_public_decoder = Reader(PublicConversation)
_conversation_decoder = Reader(Conversation)

VIEW = f"""json_build_object(
    'conversation', conversation_json(c),
    'version', c.version,
    'me', participant_json(me),
    'peer_id', CASE WHEN c.direct_low = me.user_id THEN c.direct_high ELSE c.direct_low END,
    'last_message', (
        SELECT message_json(l) FROM message l
        WHERE l.conversation_id = c.id AND l.sent_version > visible_after(c, me)
            AND (l.thread_root_id IS NULL OR l.also_in_conversation)
        ORDER BY l.sent_version DESC LIMIT 1
    ),
    'unread_count', CASE WHEN c.version <= coalesce(me.unread_from_version - 1, me.last_read_version) THEN 0 ELSE (
        {COUNT_UNREAD.format(me="me")}
    ) END,
    'last_read_message_id', me.last_read_message_id,
    'last_activity_at', c.last_activity_at,
    'preferences', preferences_json(me),
    'invite', CASE WHEN c.invite_code IS NOT NULL AND can(me.role, 'admin', me.can_add_members) THEN json_build_object(
        'code', c.invite_code, 'expires_at', c.invite_expires_at, 'uses_left', c.invite_uses_left
    ) END
)"""  # noqa: S608 - only column references are put in
"""A `ConversationView` of protocol/values.py, for the conversation `c` and the participant `me`."""

GET = f"""
SELECT {VIEW}
FROM conversation_participant me JOIN conversation c ON c.id = me.conversation_id AND NOT c.is_deleted
WHERE me.user_id = $1 AND me.conversation_id = ANY($2) AND me.status = 'active'
"""  # noqa: S608 - VIEW is a constant


async def get(db: Db, user_id: UserId, conversation_ids: Sequence[ConversationId]) -> list[ConversationView]:
    """Return the given conversations in which the user participates. The caller gives a few."""
    return _view_decoder.few(row[0] for row in await db.fetch(GET, user_id, list(conversation_ids)))


async def parts(
    db: Db, user_id: UserId, conversation_ids: Sequence[ConversationId]
) -> Undecoded[list[list[ConversationView]]]:
    """Return the given conversations in which the user participates, in their order, in parts that fit a page."""
    place = {conversation_id: number for number, conversation_id in enumerate(conversation_ids)}
    rows = await db.fetch(GET, user_id, list(place))

    def of(read: list[tuple[ConversationView, Any]]) -> list[list[ConversationView]]:
        found = sorted(read, key=lambda pair: place[pair[0].conversation.id])
        kept = []
        while found:
            count = fitting(columns for _, columns in found)
            kept.append([view for view, _ in found[:count]])
            del found[:count]
        return kept

    return _view_decoder.beside(rows).then(of)


class Filter(NamedTuple):
    """Selects conversations of a user. `before` is the last activity and the id of the previous page's last one."""

    type: ConversationType | None = None
    is_archived: bool | None = None
    is_hidden: bool | None = None
    before: Cursor | None = None


# The participant's row is passed along, because a join might search all of the user's rows for it.
ACTIVE_AT = "greatest(least(c.last_activity_at, '9999-12-30'), '0001-01-02')"
"""When a conversation was last active, within the range of a page. A restored row may have any time."""
PAGE = f"""
SELECT {VIEW}, {ACTIVE_AT}, c.id
FROM (
    SELECT c, p FROM conversation_participant p
    JOIN conversation c ON c.id = p.conversation_id AND NOT c.is_deleted
    WHERE p.user_id = $1 AND p.status = 'active'
        AND ($3::text IS NULL OR c.type = $3)
        AND ($4::boolean IS NULL OR c.is_archived = $4)
        AND ($5::boolean IS NULL OR p.is_hidden = $5)
        AND ($6::timestamptz IS NULL OR ({ACTIVE_AT}, c.id) < ($6, $7::uuid))
    ORDER BY {ACTIVE_AT} DESC, c.id DESC
    LIMIT $2
) listed
CROSS JOIN LATERAL (SELECT (listed.c).*) c
CROSS JOIN LATERAL (SELECT (listed.p).*) me
ORDER BY {ACTIVE_AT} DESC, c.id DESC
"""  # noqa: S608 - VIEW is a constant


async def page(db: Db, user_id: UserId, which: Filter, *, limit: int) -> Undecoded[Page[ConversationView]]:
    """Return up to `limit` of the user's conversations, most recently active first."""
    before = which.before or (None, None)
    rows = await db.fetch(PAGE, user_id, limit + 1, which.type, which.is_archived, which.is_hidden, *before)
    return _view_decoder.page(rows, limit, Cursor.of)


ORDER = """
SELECT c.id FROM conversation_participant p JOIN conversation c ON c.id = p.conversation_id AND NOT c.is_deleted
WHERE p.user_id = $1 AND p.status = 'active' ORDER BY c.last_activity_at DESC, c.id DESC
"""


async def order(db: Db, user_id: UserId) -> list[ConversationId]:
    """Return all of a user's conversations, most recently active first."""
    return [ConversationId(row[0]) for row in await db.fetch(ORDER, user_id)]


class Membership(NamedTuple):
    """The version of a user's conversation, and the user's read position in it."""

    version: int
    last_read: MessageId | None


MEMBERSHIPS_READ = 2_000
"""Max memberships that one statement reads."""
# For each of the users $1, at most $3 conversations after the one in $2.
MEMBERSHIPS = """
SELECT who.user_id, part.* FROM unnest($1::uuid[], $2::uuid[]) AS who (user_id, after)
CROSS JOIN LATERAL (
    SELECT c.id, c.version, p.last_read_message_id FROM conversation_participant p
    JOIN conversation c ON c.id = p.conversation_id AND NOT c.is_deleted
    WHERE p.user_id = who.user_id AND p.status = 'active' AND p.conversation_id > who.after
    ORDER BY p.conversation_id LIMIT $3
) part
"""


async def memberships(db: Db, user_ids: Sequence[UserId]) -> list[dict[ConversationId, Membership]]:
    """Return the conversations of each user, in the order of `user_ids`. A user version moves when the user joins or
    leaves meanwhile, and then these are read again.
    """
    found: dict[UserId, dict[ConversationId, Membership]] = {user_id: {} for user_id in user_ids}
    after = dict.fromkeys(found, _FIRST)
    while after:
        limit = MEMBERSHIPS_READ // len(after)
        counts: Counter[UserId] = Counter()
        for user_id, one, *rest in await db.fetch(MEMBERSHIPS, list(after), list(after.values()), limit):
            found[user_id][one] = Membership(*rest)
            counts[user_id] += 1
            after[user_id] = one
        after = {user_id: one for user_id, one in after.items() if counts[user_id] == limit}
    return [found[user_id] for user_id in user_ids]


_FIRST = ConversationId(UUID(int=0))


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


IS_DELETED = "SELECT is_deleted FROM conversation WHERE id = $1"


async def is_deleted(db: Db, conversation_id: ConversationId) -> bool:
    """Whether a conversation is deleted for everyone. Older versions deleted direct ones, too."""
    return bool(await db.fetchval(IS_DELETED, conversation_id))


OPEN = """
SELECT conversation_json(c) FROM conversation c
WHERE c.id = $1 AND c.type IN ('group', 'channel') AND c.is_active AND NOT c.is_deleted AND (c.is_public OR EXISTS (
    SELECT FROM conversation_participant p
    WHERE p.conversation_id = c.id AND p.user_id = $3 AND p.status IN ('active', 'invited')
))
UNION ALL
SELECT conversation_json(c) FROM conversation c
WHERE c.invite_code = $2 AND c.type IN ('group', 'channel') AND c.is_active AND NOT c.is_deleted
    AND (c.invite_expires_at > now() OR c.invite_expires_at IS NULL)
    AND (c.invite_uses_left > 0 OR c.invite_uses_left IS NULL)
"""


async def open_to(
    db: Db, user_id: UserId, conversation_id: ConversationId | None, invite_code: str | None
) -> Conversation | None:
    """Return the conversation with this id or code if the user may join it. It must be public, have the code, or have
    invited the user.
    """
    text = await db.fetchval(OPEN, conversation_id, invite_code, user_id)
    return None if text is None else _conversation_decoder.decode(text)


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


SET_INVITE_CODE = """
UPDATE conversation c SET invite_code = $2, invite_expires_at = now() + $3, invite_uses_left = $4, updated_at = now(),
    version = c.version + 1, settings_version = c.version + 1
WHERE c.id = $1
RETURNING conversation_json(c)
"""


async def set_invite_code(
    db: Db, conversation_id: ConversationId, code: str | None, lasts: timedelta | None, uses: int | None
) -> Conversation:
    """Replace or delete the invite code, and return the conversation. Requires the conversation's lock."""
    return _conversation_decoder.decode(await db.fetchval(SET_INVITE_CODE, conversation_id, code, lasts, uses))


USE_INVITE_CODE = """
UPDATE conversation SET invite_uses_left = invite_uses_left - 1 WHERE id = $1 AND invite_uses_left IS NOT NULL
"""


async def use_invite_code(db: Db, conversation_id: ConversationId) -> None:
    """Count a use of the invite code. Requires the conversation's lock."""
    await db.execute(USE_INVITE_CODE, conversation_id)


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


class ConversationCard(msgspec.Struct, frozen=True, kw_only=True):
    """A conversation as administrators see it, without its content."""

    conversation: Conversation
    owner: UserId | None
    message_count: int
    version: int
    last_activity_at: datetime


_card_decoder = Reader(ConversationCard)

CARD = """
SELECT json_build_object('conversation', conversation_json(c), 'message_count', c.message_count, 'version', c.version,
    'last_activity_at', c.last_activity_at, 'owner', (
        SELECT p.user_id FROM conversation_participant p
        WHERE p.conversation_id = c.id AND p.status = 'active' AND p.role = 'owner' LIMIT 1
    ))
FROM conversation c WHERE c.id = $1
"""


async def card(db: Db, conversation_id: ConversationId) -> ConversationCard | None:
    """Return a conversation as administrators see it, deleted or not."""
    text = await db.fetchval(CARD, conversation_id)
    return None if text is None else _card_decoder.decode(text)


class ConversationEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A conversation in a list."""

    id: ConversationId
    type: str
    title: str | None
    owner: UserId | None
    participants: int
    messages: int
    last_activity_at: datetime
    is_deleted: bool


_entry_decoder = Reader(ConversationEntry)

LIST = """
SELECT json_build_object('id', c.id, 'type', c.type, 'title', c.title, 'participants', c.participant_count,
    'messages', c.message_count, 'last_activity_at', c.last_activity_at, 'is_deleted', c.is_deleted, 'owner', (
        SELECT p.user_id FROM conversation_participant p
        WHERE p.conversation_id = c.id AND p.status = 'active' AND p.role = 'owner' LIMIT 1
    )), c.id
FROM conversation c
WHERE c.id < $1 AND ($2 = '' OR strpos(lower(c.title), lower($2)) > 0)
    AND ($3::uuid IS NULL OR EXISTS (
        SELECT FROM conversation_participant p WHERE p.conversation_id = c.id AND p.user_id = $3 AND p.status = 'active'
    ))
ORDER BY c.id DESC LIMIT $4 + 1
"""


async def listed(
    db: Db, part: str, before: ConversationId, *, user_id: UserId | None, limit: int
) -> Undecoded[Page[ConversationEntry]]:
    """Return conversations with `part` in the title that are older than the conversation `before`, newest first. With
    `user_id`, only those in which the user participates. There is no access check.
    """
    return _entry_decoder.page(await db.fetch(LIST, before, part, user_id, limit), limit)


EVERYTHING = """
SELECT json_build_object('kind', 'message', 'message', message_json(m),
    'withheld', CASE WHEN m.is_moderated THEN m.content END)::text, m.sent_version
FROM message m WHERE m.conversation_id = $1 AND m.sent_version > $2 ORDER BY m.sent_version LIMIT $3
"""


async def everything(db: Db, conversation_id: ConversationId, after: int, *, limit: int) -> list[tuple[str, int]]:
    """Return up to `limit` messages after a version, each as JSON with its version. There is no access check."""
    return [(row[0], row[1]) for row in await db.fetch(EVERYTHING, conversation_id, after, limit)]
