"""Participants: users in a conversation, their roles and their statuses. All changes require the
conversation's lock.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import msgspec

from protocol.client import ListParticipants
from protocol.ids import ConversationId, UserId
from protocol.roles import ROLES
from protocol.server import OutsidersChanged, ParticipantChanged, ParticipantEntry, ParticipantLeft, PreferencesChanged
from protocol.values import Participant, ParticipantStatus, Preferences, Role
from server.db.database import Db
from server.db.rows import FIRST, Page, Reader, Undecoded
from server.queries import drafts
from server.queries.users import FACE, MOVE_OWN

_participant_decoder = Reader(Participant)
_preferences_decoder = Reader(Preferences)
_entry_decoder = Reader(ParticipantEntry)
ParticipantEvent = ParticipantChanged | ParticipantLeft | OutsidersChanged
_event_decoder: Reader[ParticipantEvent] = Reader(ParticipantEvent)


class ParticipantChange(NamedTuple):
    """A participant, the number of participants, and the event for the others."""

    participant: Participant
    participant_count: int
    event: ParticipantEvent


def decoded(text: str) -> Participant:
    """Return the result of participant_json()."""
    return _participant_decoder.decode(text)


def decoded_change(row: Iterable[Any]) -> ParticipantChange:
    """Return the change that a statement returned: a participant, their number, and the event."""
    text, count, event = row
    return ParticipantChange(decoded(text), count, _event_decoder.decode(event))


GET = """
SELECT participant_json(p) FROM conversation_participant p
JOIN conversation c ON c.id = p.conversation_id AND NOT c.is_deleted
WHERE p.conversation_id = $1 AND p.user_id = $2
"""


async def get(db: Db, conversation_id: ConversationId, user_id: UserId) -> Participant | None:
    """Return a user's participation in a conversation, with any status."""
    text = await db.fetchval(GET, conversation_id, user_id)
    return None if text is None else decoded(text)


OUTSIDER = "CASE WHEN p.status IN ('invited', 'declined', 'banned') THEN p.status END"
"""The status of a participant `p` who was asked to take part or must not, in the words of participant_outsider_idx."""


def _page(of_status: str, face: str) -> str:
    return f"""
SELECT json_build_object(
    'participant', participant_json(them.p), 'last_read_message_id', (them.p).last_read_message_id,
    'last_read_revision', (them.p).last_read_version, 'user', {face}
), u.id
FROM (
    SELECT me FROM conversation_participant me
    JOIN conversation c ON c.id = me.conversation_id AND NOT c.is_deleted
    WHERE me.conversation_id = $1 AND me.user_id = $2 AND me.status = 'active' OFFSET 0
) mine
CROSS JOIN LATERAL (
    SELECT p FROM conversation_participant p
    WHERE {of_status} AND p.conversation_id = $1 AND p.user_id > $3 AND sees_participant($2, mine.me, p)
    ORDER BY p.user_id LIMIT $4
) them
JOIN "user" u ON u.id = (them.p).user_id
ORDER BY u.id
"""  # noqa: S608 - only conditions and expressions are put in


# Participants see each other's faces, so these need no check.
PAGE = _page("p.status = 'active'", FACE)
OUTSIDERS = _page(f"{OUTSIDER} = $5", f"CASE WHEN may('see_face', $2, u.id) THEN {FACE} END")


async def page(
    db: Db, user_id: UserId, frame: ListParticipants, *, limit: int
) -> Undecoded[Page[ParticipantEntry]] | None:
    """Return up to `limit` participants by user id. Return None if there are none, or without access."""
    asked = (frame.conversation_id, user_id, frame.after or FIRST, limit + 1)
    if frame.status == "active":
        rows = await db.fetch(PAGE, *asked)
    else:
        rows = await db.fetch(OUTSIDERS, *asked, frame.status)
    return _entry_decoder.page(rows, limit) if rows else None


SEEN = """
SELECT p.user_id, p.status FROM conversation_participant me
JOIN conversation_participant p ON p.conversation_id = me.conversation_id AND p.user_id = ANY($3)
WHERE me.conversation_id = $1 AND me.user_id = $2 AND sees_participant($2, me, p)
"""


async def seen(
    db: Db, conversation_id: ConversationId, viewer: UserId, user_ids: Sequence[UserId]
) -> dict[UserId, ParticipantStatus]:
    """Return the status of those of the users whose participation the viewer sees."""
    return {row[0]: row[1] for row in await db.fetch(SEEN, conversation_id, viewer, list(user_ids))}


# New participants have nothing unread, because earlier messages are history to them. An invited user who joins gets the
# role that the inviter may give now. A returning guest stays a guest. All of them are active, so `add` makes their
# events. PostgreSQL took as long to make those as for the rest.
ADD = """
WITH entering AS (
    SELECT a.user_id, row_number() OVER (ORDER BY a.user_id) AS place
    FROM (SELECT DISTINCT user_id FROM unnest($2::uuid[]) AS named (user_id)) a
    WHERE NOT EXISTS (
        SELECT FROM conversation_participant p
        WHERE p.conversation_id = $1 AND p.user_id = a.user_id AND p.status = 'active' OFFSET 0
    )
), bumped AS (
    UPDATE conversation c SET version = c.version + n.entering, access_version = c.version + n.entering,
        participant_count = c.participant_count + n.entering, last_activity_at = now()
    FROM (SELECT count(*) AS entering FROM entering) n
    WHERE c.id = $1 AND n.entering > 0
    RETURNING c.version - n.entering AS base, c.participant_count
)
INSERT INTO conversation_participant AS p (conversation_id, user_id, role, invited_by, version, joined_version,
    last_read_version)
SELECT $1, e.user_id, $3, $4, b.base + e.place, b.base + e.place, b.base FROM entering e, bumped b
ON CONFLICT (conversation_id, user_id) DO UPDATE SET
    role = CASE WHEN $4 IS NOT NULL THEN excluded.role WHEN p.role = 'guest' THEN p.role
        ELSE coalesce(invited_as(p), excluded.role) END,
    invited_by = CASE WHEN p.status = 'invited' AND $4 IS NULL THEN p.invited_by ELSE excluded.invited_by END,
    status = 'active', joined_at = now(), left_at = NULL, left_version = 0,
    version = excluded.version, joined_version = excluded.joined_version,
    last_read_version = greatest(p.last_read_version, excluded.last_read_version),
    unread_from_id = NULL, unread_from_version = NULL,
    can_add_members = false, can_remove_members = false, can_edit_conversation = false,
    can_delete_messages = false, can_pin_messages = false
RETURNING participant_json(p), (SELECT participant_count FROM bumped)
"""


async def add(
    db: Db, conversation_id: ConversationId, user_ids: Sequence[UserId], role: Role, invited_by: UserId | None
) -> list[ParticipantChange]:
    """Add users who are not active. Return them in the order of their versions.

    Without `invited_by` they join themselves. They get the role of their invitation, or stay guests.
    """
    changes = []
    for text, count in await db.fetch(ADD, conversation_id, list(user_ids), role, invited_by):
        added = decoded(text)
        event = ParticipantChanged(
            conversation_id=conversation_id, version=added.version, participant=added, participant_count=count
        )
        changes.append(ParticipantChange(added, count, event))
    return sorted(changes, key=lambda change: change.participant.version)


# When no participant is left, `remains` ends the remaining invitations. The join makes the user's row come first.
CHANGE = """
WITH bumped AS (
    UPDATE conversation SET version = version + 1, access_version = version + 1,
        participant_count = participant_count - $5, is_active = participant_count > $5,
        has_remains = has_remains OR participant_count <= $5
    WHERE id = $1 RETURNING version, participant_count
), touched AS (
    UPDATE "user" SET version = version + 1 WHERE id = $2 AND $5 > 0 RETURNING id
)
UPDATE conversation_participant p SET role = $3, status = $4, version = b.version,
    left_at = CASE WHEN $4 = 'active' THEN NULL WHEN $5 > 0 THEN now() ELSE p.left_at END,
    left_version = CASE WHEN $5 > 0 THEN b.version ELSE gone_version(p) END
FROM bumped b LEFT JOIN touched ON true WHERE p.conversation_id = $1 AND p.user_id = $2
RETURNING participant_json(p), b.participant_count, participant_event(p, b.participant_count)
"""


async def change(
    db: Db, now: Participant, *, role: Role | None = None, status: ParticipantStatus = "active"
) -> ParticipantChange:
    """Change a participant's role or status. Leaving also empties the participant's draft, and moves the user version,
    which requires the user's lock. When nobody is left, the conversation ends.
    """
    leaving = int(now.status == "active" and status != "active")
    if leaving:
        await drafts.empty(db, now.conversation_id, now.user_id)
    row = await db.fetchrow(CHANGE, now.conversation_id, now.user_id, role or now.role, status, leaving)
    assert row is not None  # noqa: S101 - the caller has read it under the lock
    return decoded_change(row)


PERMIT = """
WITH changed AS (
    SELECT w.* FROM conversation_participant p CROSS JOIN LATERAL (
        SELECT coalesce(($3::jsonb ->> 'can_add_members')::boolean, p.can_add_members) AS can_add_members,
            coalesce(($3 ->> 'can_remove_members')::boolean, p.can_remove_members) AS can_remove_members,
            coalesce(($3 ->> 'can_edit_conversation')::boolean, p.can_edit_conversation) AS can_edit_conversation,
            coalesce(($3 ->> 'can_delete_messages')::boolean, p.can_delete_messages) AS can_delete_messages,
            coalesce(($3 ->> 'can_pin_messages')::boolean, p.can_pin_messages) AS can_pin_messages
    ) w
    WHERE p.conversation_id = $1 AND p.user_id = $2
        AND (w.can_add_members, w.can_remove_members, w.can_edit_conversation, w.can_delete_messages,
            w.can_pin_messages)
        <> (p.can_add_members, p.can_remove_members, p.can_edit_conversation, p.can_delete_messages,
            p.can_pin_messages)
), bumped AS (
    UPDATE conversation SET version = version + 1, access_version = version + 1
    WHERE id = $1 AND EXISTS (SELECT FROM changed) RETURNING version, participant_count
)
UPDATE conversation_participant p SET version = b.version,
    can_add_members = c.can_add_members, can_remove_members = c.can_remove_members,
    can_edit_conversation = c.can_edit_conversation, can_delete_messages = c.can_delete_messages,
    can_pin_messages = c.can_pin_messages
FROM bumped b, changed c WHERE p.conversation_id = $1 AND p.user_id = $2
RETURNING participant_json(p), b.participant_count, participant_event(p, b.participant_count)
"""


async def permit(db: Db, now: Participant, granted: dict[str, bool]) -> ParticipantChange | None:
    """Grant permissions beyond a participant's role, or revoke them. Return None, without an effect, if nothing
    changes. Requires the conversation's lock.
    """
    row = await db.fetchrow(PERMIT, now.conversation_id, now.user_id, msgspec.json.encode(granted).decode())
    return None if row is None else decoded_change(row)


PREFER = f"""
WITH touched AS ({MOVE_OWN} RETURNING version)
UPDATE conversation_participant p SET user_version = t.version,
    pin_order = CASE WHEN $3::jsonb ? 'pin_order' THEN ($3 ->> 'pin_order')::integer ELSE pin_order END,
    is_hidden = coalesce(($3 ->> 'is_hidden')::boolean, is_hidden),
    is_muted = coalesce(($3 ->> 'is_muted')::boolean, is_muted),
    muted_until = CASE WHEN $3 ? 'muted_until' THEN ($3 ->> 'muted_until')::timestamptz ELSE muted_until END,
    notification_level = coalesce($3 ->> 'notification_level', notification_level),
    notifications_enabled = coalesce($3 ->> 'notification_level', notification_level) <> 'none'
FROM touched t WHERE p.conversation_id = $1 AND p.user_id = $2 AND p.status = 'active' AND EXISTS (
    SELECT FROM conversation c WHERE c.id = $1 AND NOT c.is_deleted
)
RETURNING p.user_version, preferences_json(p)
"""  # noqa: S608 - MOVE_OWN is a constant


async def prefer(
    db: Db, conversation_id: ConversationId, user_id: UserId, changes: dict[str, Any]
) -> PreferencesChanged | None:
    """Change a user's preferences for a conversation. Return None, without an effect, without access."""
    row = await db.fetchrow(PREFER, conversation_id, user_id, msgspec.json.encode(changes).decode())
    return None if row is None else decoded_preferences(conversation_id, *row)


def decoded_preferences(conversation_id: ConversationId, version: int, preferences: str) -> PreferencesChanged:
    """Return the event of a user version with the result of preferences_json()."""
    return PreferencesChanged(
        user_version=version, conversation_id=conversation_id, preferences=_preferences_decoder.decode(preferences)
    )


# Users are locked in the order of their ids, after the conversation, as everywhere.
STAMP = """
WITH touched AS (
    UPDATE "user" u SET version = u.version + 1
    FROM (SELECT id FROM "user" WHERE id = ANY($2::uuid[] || $3::uuid[]) ORDER BY id FOR NO KEY UPDATE) t
    WHERE u.id = t.id
    RETURNING u.id, u.version
)
UPDATE conversation_participant p SET user_version = t.version FROM touched t
WHERE p.conversation_id = $1 AND p.user_id = t.id AND p.user_id = ANY($2)
"""


async def stamp(
    db: Db,
    conversation_id: ConversationId,
    user_ids: Sequence[UserId],
    *,
    also: Sequence[UserId] = (),
) -> None:
    """Move user versions, because of invitations to a conversation. Those in `also` move without a change of their
    participation's row.
    """
    await db.execute(STAMP, conversation_id, list(user_ids), list(also))


HEIRS_LOOKED_AT = 1_000
"""Max participants per role that are considered when an owner leaves."""
# Reads the index in order, up to the first active account.
HEIR = f"""
SELECT participant_json(heir.p) FROM (
    SELECT first.p FROM unnest($4::text[]) WITH ORDINALITY AS rank (role, place)
    CROSS JOIN LATERAL (
        SELECT o.p FROM (
            SELECT p, p.user_id, p.joined_at FROM conversation_participant p
            WHERE CASE WHEN p.status = 'active' THEN p.role END = rank.role AND p.conversation_id = $1
                AND p.user_id <> $2
            ORDER BY p.joined_at, p.user_id LIMIT {HEIRS_LOOKED_AT}
        ) o
        WHERE NOT $3::boolean OR EXISTS (
            SELECT FROM "user" u WHERE u.id = o.user_id AND u.is_active AND NOT u.is_deleted OFFSET 0
        )
        ORDER BY o.joined_at, o.user_id LIMIT 1
    ) first
    ORDER BY rank.place LIMIT 1
) heir
"""  # noqa: S608 - a number is put in


async def heir(db: Db, leaving: Participant) -> Participant | None:
    """Return the next owner: the highest in role, and then the oldest participant, with an active account. If no
    considered account is active, return the first of all. Some may be restored, and there is always an owner.
    """
    for is_active in (True, False):
        text = await db.fetchval(HEIR, leaving.conversation_id, leaving.user_id, is_active, ROLES[::-1])
        if text is not None:
            return decoded(text)
    return None


async def leave(db: Db, leaving: Participant) -> list[ParticipantChange]:
    """Make a participant leave. If an owner leaves, the next owner takes over."""
    changes = [await change(db, leaving, status="left")]
    if leaving.role == "owner" and (next_one := await heir(db, leaving)) is not None:
        changes.append(await change(db, next_one, role="owner"))
    return changes
