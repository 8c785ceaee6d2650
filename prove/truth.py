"""Reads the rows from PostgreSQL, with statements of its own, and compares them with what clients received."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeAlias, TypeVar

import asyncpg
import msgspec

from protocol import json_object
from protocol.ids import ConversationId, EditId, MessageId, UserId
from protocol.payloads import Payload
from protocol.server import MessageDelivered, MessageRead, StateEvent, UserUpdated
from protocol.values import Conversation, ConversationSettings, LinkPreview, Message, Participant, Permissions
from prove.mirror import Copy, Mirror

Db: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
Kind = TypeVar("Kind", Message, Conversation)

_CONVERSATION = f"""
SELECT version AS clock, {
    ", ".join("settings_version AS version" if one == "version" else one for one in Conversation.__struct_fields__)
} FROM conversation WHERE id = $1
"""  # noqa: S608 - only names of columns
_STORED = [field for field in Message.__struct_fields__ if field != "is_unreadable"]
_MESSAGES = f"SELECT {', '.join(_STORED)} FROM message WHERE conversation_id = $1"  # noqa: S608 - as above
_GRANTS = {
    "can_add_members": "admin",
    "can_remove_members": "admin",
    "can_edit_conversation": "admin",
    "can_delete_messages": "moderator",
    "can_pin_messages": "moderator",
}
"""The lowest role that has each permission without a grant (docs/decisions/0001)."""
_JSON = {"reactions", "metadata", "settings", "payload", "link_preview"}
_TYPES: dict[str, Any] = {"settings": ConversationSettings, "payload": Payload, "link_preview": LinkPreview}
_RANKS = ("guest", "member", "moderator", "admin", "owner")
UNREAD_WINDOW = 100
"""Max messages that an unread count reads, newest first (protocol/values.py, ConversationView)."""

RECOUNT = """
SELECT 'participants of ' || c.id FROM conversation c WHERE participant_count <> (
    SELECT count(*) FROM conversation_participant p WHERE p.conversation_id = c.id AND p.status = 'active')
UNION ALL
SELECT 'messages of ' || c.id FROM conversation c WHERE message_count <> (
    SELECT count(*) FROM message m WHERE m.conversation_id = c.id AND NOT m.is_deleted)
UNION ALL
SELECT 'replies to ' || m.id FROM message m WHERE reply_count <> (
    SELECT count(*) FROM message r WHERE r.thread_root_id = m.id AND NOT r.is_deleted)
UNION ALL
SELECT 'places in the thread of ' || m.id FROM message m WHERE m.thread_root_id IS NULL AND (
    m.thread_order <> (SELECT count(*) FROM message r WHERE r.thread_root_id = m.id)
    OR m.thread_order <> (SELECT coalesce(max(r.thread_order), 0) FROM message r WHERE r.thread_root_id = m.id))
UNION ALL
SELECT 'votes of ' || m.id FROM message m WHERE m.poll_counts IS NOT NULL AND (
    m.poll_voters <> (SELECT count(*) FROM poll_vote v WHERE v.message_id = m.id AND v.options <> '{}')
    OR m.poll_counts <> ARRAY(
        SELECT (SELECT count(*) FROM poll_vote v WHERE v.message_id = m.id AND n - 1 = ANY(v.options))::integer
        FROM generate_subscripts(m.poll_counts, 1) n ORDER BY n
    ))
UNION ALL
SELECT 'search words of ' || m.id FROM message m LEFT JOIN message_search s ON s.message_id = m.id
WHERE (s.message_id IS NOT NULL) <> (NOT m.is_deleted AND NOT m.is_moderated AND NOT m.is_system_message)
    AND (s.message_id IS NOT NULL OR m.id NOT IN (SELECT unnest(q.message_ids) FROM search_queue q))
UNION ALL
SELECT 'reactions to ' || m.id FROM message m WHERE reactions <> coalesce((
    SELECT jsonb_object_agg(emoji, n) FROM (
        SELECT emoji, count(*) AS n FROM message_reaction r
        WHERE r.message_id = m.id AND NOT r.is_removed AND NOT m.is_deleted GROUP BY emoji
    ) counted), '{}')
UNION ALL
SELECT 'version of ' || c.id FROM conversation c WHERE c.version <> greatest(
    settings_version,
    (SELECT max(version) FROM message m WHERE m.conversation_id = c.id),
    (SELECT max(version) FROM message_reaction r WHERE r.conversation_id = c.id),
    (SELECT max(version) FROM poll_vote v WHERE v.conversation_id = c.id),
    (SELECT max(version) FROM conversation_participant p WHERE p.conversation_id = c.id))
UNION ALL
SELECT 'owner of ' || c.id FROM conversation c
WHERE c.type IN ('group', 'channel') AND NOT c.is_deleted AND (CASE WHEN c.is_active THEN 1 ELSE 0 END) <> (
    SELECT count(*) FROM conversation_participant p
    WHERE p.conversation_id = c.id AND p.status = 'active' AND p.role = 'owner')
UNION ALL
SELECT 'read position of ' || p.user_id FROM conversation_participant p JOIN message m ON m.id = p.last_read_message_id
WHERE m.conversation_id <> p.conversation_id OR m.sent_version > p.last_read_version
UNION ALL
SELECT 'place of ' || min(m.id::text) FROM message m GROUP BY conversation_id, sent_version HAVING count(*) > 1
"""
"""Counts that differ from the counted rows, versions that differ from the last change, and versions used twice."""


async def read_conversation(db: Db, conversation_id: ConversationId) -> Copy:
    """Return a conversation from PostgreSQL. Raises LookupError if it does not exist."""
    async with db.transaction(isolation="repeatable_read", readonly=True):
        row = await db.fetchrow(_CONVERSATION, conversation_id)
        if row is None:
            raise LookupError(conversation_id)
        copy = Copy(version=row["clock"], conversation=_struct(Conversation, row))
        for row in await db.fetch(_MESSAGES, conversation_id):
            copy.messages[row["id"]] = _struct(Message, row)
        for row in await db.fetch(
            "SELECT * FROM conversation_participant WHERE conversation_id = $1 AND status = 'active'", conversation_id
        ):
            copy.participants[row["user_id"]] = _participant(row)
    return copy


_OWN = """
SELECT 'bio' AS kind, '' AS key, bio AS value FROM "user" WHERE id = $1
UNION ALL
SELECT 'relationship', id::text, status FROM user_relationship
WHERE from_user_id = $1 OR (to_user_id = $1 AND type IN ('friend', 'follow'))
UNION ALL
SELECT 'invitation', p.conversation_id::text, '' FROM conversation_participant p
JOIN conversation c ON c.id = p.conversation_id WHERE p.user_id = $1 AND p.status = 'invited' AND c.is_active
UNION ALL
SELECT 'pin', p.conversation_id::text, p.pin_order::text FROM conversation_participant p
JOIN conversation c ON c.id = p.conversation_id
WHERE p.user_id = $1 AND p.status = 'active' AND p.pin_order IS NOT NULL AND NOT c.is_deleted
UNION ALL
SELECT 'star', message_id::text, '' FROM message_star WHERE user_id = $1 AND NOT is_removed
UNION ALL
SELECT 'draft', conversation_id::text, content FROM draft WHERE user_id = $1 AND content <> ''
UNION ALL
SELECT 'scheduled', id::text, status FROM scheduled_message WHERE sender_id = $1
UNION ALL
SELECT 'thread', root_id::text, is_following::text FROM thread_follow WHERE user_id = $1 AND user_version > 0
"""


async def own(db: Db, user_id: UserId) -> set[tuple[str, str, str | None]]:
    """Return a user's own data: profile, relationships, invitations, pins, stars, drafts and the like."""
    return {tuple(row) for row in await db.fetch(_OWN, user_id)}


def own_of(mirror: Mirror) -> set[tuple[str, str, str | None]]:
    """Return the same data from a client's mirror."""
    found: set[tuple[str, str, str | None]] = {("bio", "", None if mirror.me is None else mirror.me.bio)}
    found |= {("relationship", str(one.id), one.status) for one in mirror.relationships.values()}
    found |= {("invitation", str(one), "") for one in mirror.invitations}
    found |= {("star", str(one), "") for one in mirror.stars}
    found |= {("draft", str(one), content) for one, content in mirror.drafts.items() if content}
    found |= {("scheduled", str(one), status) for one, status in mirror.scheduled.items()}
    found |= {("thread", str(one), str(is_following).lower()) for one, is_following in mirror.follows.items()}
    return found | {
        ("pin", str(one), str(kept.pin_order))
        for one, kept in mirror.preferences.items()
        if one in mirror.copies and kept.pin_order is not None
    }


async def recount(db: Db) -> list[str]:
    """Return the stored counts and versions that differ from the rows."""
    return [row[0] for row in await db.fetch(RECOUNT)]


async def memberships(db: Db, user_id: UserId) -> set[ConversationId]:
    """Return the conversations in which a user participates."""
    rows = await db.fetch(
        "SELECT p.conversation_id FROM conversation_participant p JOIN conversation c ON c.id = p.conversation_id"
        " WHERE p.user_id = $1 AND p.status = 'active' AND NOT c.is_deleted",
        user_id,
    )
    return {row[0] for row in rows}


async def unread(db: Db, user_id: UserId, conversation_id: ConversationId) -> int:
    """Count a user's unread messages one by one, among the newest `UNREAD_WINDOW` in the conversation after the read
    position. Messages that are deleted, hidden, silenced, or from the user or the system do not count.
    """
    me = await db.fetchrow(
        "SELECT last_read_version, unread_from_version FROM conversation_participant"
        " WHERE conversation_id = $1 AND user_id = $2",
        conversation_id, user_id,
    )  # fmt: skip
    silenced = {
        row[0]
        for row in await db.fetch(
            "SELECT to_user_id FROM user_relationship"
            " WHERE from_user_id = $1 AND type IN ('block', 'mute') AND status = 'active'",
            user_id,
        )
    }
    past = 0 if me is None else me[0] if me[1] is None else me[1] - 1
    rows = await db.fetch(
        "SELECT * FROM message WHERE conversation_id = $1 ORDER BY sent_version DESC", conversation_id
    )
    window = [
        row
        for row in rows
        if row["sent_version"] > past and (row["thread_root_id"] is None or row["also_in_conversation"])
    ]
    count = 0
    for row in window[:UNREAD_WINDOW]:
        is_others = row["sender_id"] != user_id and row["sender_id"] not in silenced
        if is_others and not (row["is_deleted"] or row["is_system_message"] or row["is_moderated"]):
            count += 1
    return count


async def read_position(db: Db, conversation_id: ConversationId, user_id: UserId) -> int | None:
    """Return the version of the last message that a participant has read, or None for others."""
    position: int | None = await db.fetchval(
        "SELECT last_read_version FROM conversation_participant"
        " WHERE conversation_id = $1 AND user_id = $2 AND status = 'active'",
        conversation_id, user_id,
    )  # fmt: skip
    return position


async def waiting(db: Db) -> int:
    """Return how many scheduled messages are due within a minute and not sent."""
    query = "SELECT count(*) FROM scheduled_message WHERE status = 'waiting' AND send_at < now() + interval '1 minute'"
    return int(await db.fetchval(query))


async def unsent(db: Db, ids: Collection[MessageId]) -> list[str]:
    """Return the violations among scheduled messages: one is unknown, or stored without the status `sent`, or the
    reverse.
    """
    rows = await db.fetch(
        "SELECT s.id, s.status, EXISTS (SELECT FROM message m WHERE m.id = s.id) FROM scheduled_message s"
        " WHERE s.id = ANY($1)",
        list(ids),
    )
    found = [f"{one} is {status}" for one, status, is_there in rows if (status == "sent") is not is_there]
    return found + [f"{one} is not known" for one in set(ids) - {row[0] for row in rows}]


async def absent(db: Db, table: str, ids: Collection[MessageId | EditId]) -> int:
    """Return how many ids are not in `table`, which is a constant of the caller."""
    there = await db.fetchval(f"SELECT count(*) FROM {table} WHERE id = ANY($1)", list(ids))  # noqa: S608 - a constant
    return len(ids) - int(there)


AHEAD = """
SELECT count(*)
FROM unnest($1::text[], $2::uuid[], $3::uuid[], $4::bigint[]) AS s (kind, conversation_id, user_id, revision)
LEFT JOIN "user" u ON u.id = s.user_id
LEFT JOIN conversation_participant p ON p.conversation_id = s.conversation_id AND p.user_id = s.user_id
WHERE s.revision > CASE s.kind WHEN 'read' THEN p.last_read_version WHEN 'delivered' THEN p.delivered_version
    ELSE u.face_version END
"""


async def ahead(db: Db, states: Iterable[StateEvent]) -> int:
    """Return how many read positions, delivered positions and faces are later than the stored ones."""
    return int(await db.fetchval(AHEAD, *_columns(states)))


def _columns(states: Iterable[StateEvent]) -> list[list[Any]]:
    """Return the kinds, conversations, users and revisions of positions and faces."""
    rows: list[tuple[str, ConversationId | None, UserId, int]] = []
    for one in states:
        match one:
            case MessageRead() | MessageDelivered():
                kind = "read" if isinstance(one, MessageRead) else "delivered"
                rows.append((kind, one.conversation_id, one.user_id, one.revision))
            case UserUpdated():
                rows.append(("face", None, one.user.id, one.revision))
            case _:
                pass  # the revision of a presence is the time at which it was read
    return [[row[column] for row in rows] for column in range(4)]


BEHIND = """
SELECT s.kind, s.user_id, s.revision
FROM unnest($1::text[], $2::uuid[], $3::uuid[], $4::bigint[]) AS s (kind, conversation_id, user_id, revision)
JOIN "user" u ON u.id = s.user_id
LEFT JOIN conversation c ON c.id = s.conversation_id
LEFT JOIN conversation_participant p ON p.conversation_id = c.id AND p.user_id = s.user_id AND p.status = 'active'
LEFT JOIN message m ON m.id = CASE s.kind WHEN 'read' THEN p.last_read_message_id ELSE p.delivered_message_id END
WHERE CASE s.kind WHEN 'face' THEN u.face_version > s.revision AND may('see_face', $5, u.id)
    ELSE m.sent_version > s.revision AND (s.user_id = $5 OR c.participant_count <= 100) END
    AND (s.kind <> 'delivered' OR s.user_id = $5 OR NOT EXISTS (
        SELECT FROM user_relationship r WHERE (r.type = 'block' OR NOT r.can_see_online_status)
            AND (r.from_user_id, r.to_user_id) IN ((s.user_id, $5), ($5, s.user_id))
    ))
"""
"""Positions and faces that are older than those stored, of which the user $5 was told. Conversations of up to 100
participants share positions. An arrival is hidden from those who may not see the presence at that time.
"""


async def behind(db: Db, user_id: UserId, states: Iterable[StateEvent]) -> list[str]:
    """Return the read positions, delivered positions and faces that a user received and whose later ones are stored.
    A client with no other connection since the first of them has lost an event.
    """
    rows = await db.fetch(BEHIND, *_columns(states), user_id)
    return [f"{kind} of {about} at {revision}" for kind, about, revision in rows]


def differences(copy: Copy, truth: Copy) -> list[str]:
    """Return descriptions of how a complete copy differs from the rows."""
    found: list[str] = []
    if copy.version != truth.version:
        found.append(f"version {copy.version} is {truth.version}")
    if copy.conversation != truth.conversation:
        found.append(_difference(copy.conversation, truth.conversation))
    active = {user_id: one for user_id, one in copy.participants.items() if one.status == "active"}
    found += _unlike(active, truth.participants)
    found += _unlike(copy.messages, truth.messages)
    return found


def assert_same(copy: Copy, truth: Copy) -> None:
    """Raise AssertionError with a description unless a copy is complete and equal to the rows."""
    assert not copy.missing, f"these versions did not arrive: {sorted(copy.missing)}"  # noqa: S101 - an assertion
    assert not (found := differences(copy, truth)), "\n".join(found)  # noqa: S101 - as above


def _struct(kind: type[Kind], row: asyncpg.Record) -> Kind:
    fields = {field: row[field] for field in kind.__struct_fields__ if field in row.keys()}  # noqa: SIM118 - a record has values
    decoded = {
        field: msgspec.json.decode(value) if field in _JSON and value else value for field, value in fields.items()
    }
    for field, typed in _TYPES.items():
        if decoded.get(field) is not None:
            decoded[field] = msgspec.convert(decoded[field], typed, dec_hook=json_object.read)
    if decoded.get("is_moderated"):
        decoded |= {
            "content": "", "formatted_content": None, "mentions": [], "metadata": None, "payload": None,
            "loud_mentions": [], "hashtags": [], "link_preview": None,
        }  # fmt: skip
    return kind(**decoded)


def _participant(row: asyncpg.Record) -> Participant:
    rank = _RANKS.index(row["role"])
    grants = {grant: row[grant] or rank >= _RANKS.index(least) for grant, least in _GRANTS.items()}
    fields = {field: row[field] for field in Participant.__struct_fields__ if field != "permissions"}
    return Participant(permissions=Permissions(**grants), **fields)


def _unlike(copy: Mapping[Any, object], truth: Mapping[Any, object]) -> Iterable[str]:
    for one in copy.keys() | truth.keys():
        if copy.get(one) != truth.get(one):
            yield f"{one}: {_difference(copy.get(one), truth.get(one))}"


def _difference(mine: object, theirs: object) -> str:
    """Describe a difference by the fields that differ, because descriptions are cut (`MAX_CHARACTERS`)."""
    if type(mine) is not type(theirs) or not isinstance(mine, msgspec.Struct):
        return f"{mine} is {theirs}"
    pairs = ((field, getattr(mine, field), getattr(theirs, field)) for field in mine.__struct_fields__)
    fields = ", ".join(f"{field} {one!r} is {other!r}" for field, one, other in pairs if one != other)
    return f"{type(mine).__name__}: {fields}"
