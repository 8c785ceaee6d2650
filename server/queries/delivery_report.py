"""The delivery report of a message: stored, delivered and read, and why it did not reach others.

A user learns only what the user may know about others. Users who block the viewer, are invisible or hide their presence
are reported as `offline`, like all who are away. An operator, who has no viewer, learns everything.
"""

from datetime import datetime

import msgspec

from protocol.errors import CloseCode
from protocol.ids import ConversationId, MessageId, UserId
from protocol.limits import MAX_TRACED_PARTICIPANTS
from protocol.server import DeliveryReport
from protocol.values import Recipient
from server.db.database import Db
from server.db.rows import Reader
from server.queries.receipts import TAKEN_IN

MOST = 100
"""Max recipients in a report."""


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """The report, as read from the rows."""

    message_id: MessageId
    conversation_id: ConversationId
    sender_id: UserId
    version: int
    stored_at: datetime
    delivered_to: int
    read_by: int
    recipients: list[Recipient]


_told_decoder = Reader(Told)

_TAKEN_IN = TAKEN_IN.format(who="p")
_THEIRS = f"""(
            SELECT p.*, gone_version(p) AS gone FROM conversation_participant p
            WHERE p.conversation_id = m.conversation_id
            LIMIT CASE WHEN $2::uuid IS NOT NULL THEN {MAX_TRACED_PARTICIPANTS} END
        )"""  # noqa: S608 - a number is put in
"""The rows of participants in the conversation of the message `m`. An operator, who has no viewer, receives all."""

# Those without the message come first. `slow` stands for a user whose connection was closed as too slow after the
# message was sent, and who has not returned. The client of an online user may not support confirmations.
OF = f"""
SELECT json_build_object('message_id', m.id, 'conversation_id', m.conversation_id, 'sender_id', m.sender_id,
    'version', m.sent_version, 'stored_at', m.created_at,
    'delivered_to', (SELECT count(*) FROM {_THEIRS} p
        WHERE p.status = 'active' AND p.user_id <> m.sender_id AND {_TAKEN_IN} >= m.sent_version
            AND p.joined_version < m.sent_version),
    'read_by', (SELECT count(*) FROM {_THEIRS} p
        WHERE p.status = 'active' AND p.user_id <> m.sender_id AND p.last_read_version >= m.sent_version
            AND p.joined_version < m.sent_version),
    'recipients', coalesce((
        SELECT json_agg(json_build_object('user_id', r.user_id, 'state', r.state, 'at', CASE r.state
            WHEN 'read' THEN r.last_read_at WHEN 'delivered' THEN r.delivered_at WHEN 'left' THEN r.left_at
            WHEN 'joined_later' THEN CASE r.status WHEN 'active' THEN r.joined_at END END)) FROM (
            SELECT p.*, CASE
                WHEN p.status <> 'active' AND p.gone < m.sent_version THEN 'left'
                WHEN p.joined_version > m.sent_version THEN 'joined_later'
                WHEN p.last_read_version >= m.sent_version THEN 'read'
                WHEN p.status <> 'active' THEN 'left'
                WHEN m.is_moderated THEN 'hidden'
                WHEN p.taken_in >= m.sent_version THEN 'delivered'
                WHEN $2::uuid IS NULL AND m.sender_id = ANY(blocked.by_them) THEN 'blocked'
                WHEN $2 IS NULL AND (m.sender_id = ANY(silenced(p.user_id))
                    OR (p.is_muted AND (p.muted_until IS NULL OR p.muted_until > now()))) THEN 'muted'
                WHEN $2 IS NOT NULL AND (u.status = 'invisible' OR NOT may('see_presence', $2, p.user_id))
                    THEN 'offline'
                WHEN NOT u.is_online AND u.last_close = {CloseCode.SLOW:d} AND u.last_seen_at >= m.created_at
                    THEN 'slow'
                WHEN NOT u.is_online THEN 'offline'
                ELSE 'unconfirmed' END AS state
            FROM (
                SELECT p.*, {_TAKEN_IN} AS taken_in FROM {_THEIRS} p
                WHERE p.user_id <> m.sender_id AND (p.status = 'active' OR p.gone > 0)
                ORDER BY {_TAKEN_IN}, p.user_id LIMIT {MOST}
            ) p
            JOIN "user" u ON u.id = p.user_id
            CROSS JOIN LATERAL (
                SELECT ARRAY(SELECT b.to_user_id FROM user_relationship b
                    WHERE b.from_user_id = p.user_id AND b.type = 'block' AND b.status = 'active') AS by_them
            ) blocked
        ) r
    ), '[]'))
FROM message m WHERE m.id = $1 AND ($3::uuid IS NULL OR (m.conversation_id = $3) IS TRUE)
"""  # noqa: S608 - a number is put in


async def of(
    db: Db, message_id: MessageId, conversation_id: ConversationId | None, *, viewer: UserId | None
) -> Told | None:
    """Return the delivery report of a message, as far as the viewer may know it. Without a viewer, return all of it."""
    text = await db.fetchval(OF, message_id, viewer, conversation_id)
    return None if text is None else _told_decoder.decode(text)


def answer(told: Told, published_at: datetime | None) -> DeliveryReport:
    """Return the reply of `why`."""
    return DeliveryReport(
        message_id=told.message_id, sender_id=told.sender_id, version=told.version, stored_at=told.stored_at,
        published_at=published_at, delivered_to=told.delivered_to, read_by=told.read_by, recipients=told.recipients,
    )  # fmt: skip
