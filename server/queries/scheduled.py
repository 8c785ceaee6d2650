"""Scheduled messages: stored until they are due, claimed by one worker, and sent as other messages are."""

from datetime import UTC, datetime, timedelta
from typing import NamedTuple
from uuid import UUID

import asyncpg
import msgspec

from protocol import json_object
from protocol.client import Schedule, Send
from protocol.ids import ConversationId, MessageId, UserId
from protocol.limits import MAX_PAGE
from protocol.server import ScheduledChanged
from protocol.values import Scheduled, ScheduledStatus, User, Words
from server.db.database import Db
from server.db.rows import Page, Reader, Undecoded
from server.queries.cursor import Cursor
from server.queries.moment import MOMENT
from server.queries.users import FACE, MOVE_OWN

_scheduled_decoder = Reader(Scheduled)
_words_decoder = msgspec.json.Decoder(Words, dec_hook=json_object.read)
_user_decoder = Reader(User)

CLAIMED = timedelta(seconds=15)
"""Time after which another worker may claim a claimed message."""
MAX_DELETED = 50
"""Max messages that one statement of `forget` deletes."""
WALKED = 500
"""Max due messages in a page of `walk`."""
KEPT = timedelta(days=366 + 2 * 30)
"""Min age of `send_at` of a finished message before its row is deleted. An earlier copy of its frame may have a
`send_at` 366 days later. A frame with a `send_at` more than 30 days ago is refused, so no late copy is sent again.
"""

GET = (
    "SELECT scheduled_json(s) FROM scheduled_message s WHERE s.id = $1 AND s.sender_id = $2 AND s.conversation_id = $3"
)
WAITING = "SELECT count(*) FROM scheduled_message s WHERE s.sender_id = $1 AND s.status = 'waiting'"


async def get(db: Db, message_id: MessageId, user_id: UserId, conversation_id: ConversationId) -> Scheduled | None:
    """Return a user's scheduled message with an id."""
    text = await db.fetchval(GET, message_id, user_id, conversation_id)
    return None if text is None else _scheduled_decoder.decode(text)


async def count(db: Db, user_id: UserId) -> int:
    """Return the number of a user's waiting messages. Requires the user's lock."""
    return int(await db.fetchval(WAITING, user_id))


# A claimed message can no longer change. A worker that lost the database's answer may have deferred a message that was
# sent.
_WAITS = """s.sender_id = $2 AND s.conversation_id = $3 AND s.claimed_at IS NULL AND NOT EXISTS (
        SELECT FROM message m WHERE m.id = $1 AND m.sender_id = $2 AND (m.conversation_id = $3) IS TRUE
    )"""
PUT = f"""
WITH touched AS ({MOVE_OWN} RETURNING version)
INSERT INTO scheduled_message AS s (id, sender_id, conversation_id, words, send_at, user_version)
SELECT $1, $2, $3, $4, $5, t.version FROM touched t
ON CONFLICT (id) DO UPDATE SET words = excluded.words, send_at = excluded.send_at, user_version = excluded.user_version,
        not_before = NULL
    WHERE s.status = 'waiting' AND {_WAITS}
RETURNING scheduled_json(s), s.user_version
"""  # noqa: S608 - constants are put in
CANCEL = f"""
WITH touched AS ({MOVE_OWN} RETURNING version)
UPDATE scheduled_message s SET status = 'cancelled', not_before = NULL, user_version = t.version FROM touched t
WHERE s.id = $1 AND s.status = 'waiting' AND {_WAITS}
RETURNING scheduled_json(s), s.user_version
"""  # noqa: S608 - constants are put in


async def put(db: Db, frame: Schedule, user_id: UserId) -> ScheduledChanged | None:
    """Schedule a message, or change a waiting one. Return None if the id is taken, or if the message can no longer
    change. Requires the user's lock.
    """
    return _changed(
        await db.fetchrow(PUT, frame.message_id, user_id, frame.conversation_id, _words(frame), frame.send_at)
    )


def _changed(row: asyncpg.Record | None) -> ScheduledChanged | None:
    if row is None:
        return None
    return ScheduledChanged(user_version=row[1], scheduled=_scheduled_decoder.decode(row[0]))


# A message without content was sent and has expired (`expire_messages`). Nobody can schedule one.
IS_REPEATED = """
SELECT s.words IN ($4::jsonb, '{"content": ""}') AND s.send_at = $5 FROM scheduled_message s
WHERE s.id = $1 AND s.sender_id = $2 AND s.conversation_id = $3 AND s.status IN ('waiting', 'sent')
"""


async def is_repeated(db: Db, frame: Schedule, user_id: UserId) -> bool:
    """Whether a waiting or sent message has the content and the time of a frame."""
    place = (frame.message_id, user_id, frame.conversation_id)
    return bool(await db.fetchval(IS_REPEATED, *place, _words(frame), frame.send_at))


def _words(frame: Schedule) -> str:
    return msgspec.json.encode(
        msgspec.convert(frame, Words, from_attributes=True, dec_hook=json_object.accept)
    ).decode()


async def cancel(
    db: Db, message_id: MessageId, user_id: UserId, conversation_id: ConversationId
) -> ScheduledChanged | None:
    """Cancel a waiting message. Return None if there is none, or if it can no longer change. Requires the
    user's lock.
    """
    return _changed(await db.fetchrow(CANCEL, message_id, user_id, conversation_id))


LIST = f"""
SELECT scheduled_json(s), {MOMENT.format(at="s.send_at")}, s.id
FROM scheduled_message s WHERE s.sender_id = $1 AND s.status IN ('waiting', 'failed')
    AND ($2::timestamptz IS NULL OR (s.send_at, s.id) < ($2, $3::uuid))
ORDER BY s.send_at DESC, s.id DESC LIMIT {MAX_PAGE + 1}
"""  # noqa: S608 - a column and a number are put in


async def page(db: Db, user_id: UserId, before: Cursor | None) -> Undecoded[Page[Scheduled]]:
    """Return a page of a user's messages that wait or could not be sent, latest first."""
    return _scheduled_decoder.page(await db.fetch(LIST, user_id, *(before or (None, None))), MAX_PAGE, Cursor.of)


class DueScheduled(NamedTuple):
    """A due message."""

    message_id: MessageId
    conversation_id: ConversationId
    sender_id: UserId
    sender: User | None
    """None if the sender's account is not active, or cannot be read."""
    frame: Send | None
    """None if the message cannot be read."""
    claimed_at: datetime
    """Identifies the claim. A later claim has another time, and a deferred message has none."""


class ClaimLost(Exception):  # noqa: N818 - another worker has the message now
    """The message was claimed again, deferred, cancelled or finished meanwhile."""


class Waiting(NamedTuple):
    """A due message, with its place in the order of turns."""

    send_at: datetime
    message_id: MessageId
    sender_id: UserId


# The next sender is found by reading the index in order, a page at a time. Starting at the beginning for each claim
# would pass all due messages of senders who had their turn. IS TRUE keeps the planner from reading and sorting all due
# messages.
_IS_FREE = """s.send_at <= now() AND (s.not_before IS NULL OR s.not_before <= now())
    AND (s.claimed_at IS NULL OR s.claimed_at < now() - $1::interval)"""
WALK = f"""
SELECT s.send_at, s.id, s.sender_id FROM scheduled_message s
WHERE s.status = 'waiting' AND (s.send_at, s.id) > ($2::timestamptz, $3::uuid) AND ({_IS_FREE}) IS TRUE
ORDER BY s.send_at, s.id LIMIT $4
"""  # noqa: S608 - a constant is put in


async def walk(db: Db, after: Waiting | None) -> list[Waiting]:
    """Return up to `WALKED` due messages without a claim, the earliest first. `after` is the last one of the page
    before.
    """
    place = (datetime.min.replace(tzinfo=UTC), UUID(int=0)) if after is None else (after.send_at, after.message_id)
    return [Waiting(*row) for row in await db.fetch(WALK, CLAIMED, *place, WALKED)]


# One claim takes one message. A sender with a valid claim gets no other one, so the sender's messages are sent in
# order, concurrently with those of other senders. A deferred message is not overtaken in its conversation. The sender's
# lock keeps the sender's frames and other workers' claims away from all rows. Locked senders are skipped. `CLAIM`
# checks again under that lock, because another worker may have committed a claim since `SENDER` began. A deleted or
# disabled sender sends nothing any more. All waiting messages of the sender are read once. Otherwise each of many
# messages for the same minute would be compared with all.
_FIRST_DUE = f"""
    WITH mine AS MATERIALIZED (
        SELECT s.id, s.conversation_id, s.send_at, s.claimed_at, s.not_before FROM scheduled_message s
        WHERE s.sender_id = $2 AND s.status = 'waiting'
    ), put_off AS MATERIALIZED (
        SELECT s.id, s.conversation_id, s.send_at FROM mine s WHERE s.not_before > now()
    )
    SELECT s.id FROM mine s
    WHERE {_IS_FREE} AND NOT EXISTS (SELECT FROM mine o WHERE o.claimed_at >= now() - $1::interval)
        AND NOT EXISTS (
            SELECT FROM put_off o
            WHERE o.conversation_id = s.conversation_id AND (o.send_at, o.id) < (s.send_at, s.id)
        )
    ORDER BY s.send_at, s.id LIMIT 1
"""  # noqa: S608 - a constant is put in
SENDER = f"""
SELECT CASE WHEN u.is_active AND NOT u.is_deleted THEN {FACE} END FROM "user" u
WHERE u.id = $2 AND EXISTS ({_FIRST_DUE}) FOR NO KEY UPDATE OF u SKIP LOCKED
"""  # noqa: S608 - constants are put in
CLAIM = f"""
WITH first AS MATERIALIZED ({_FIRST_DUE})
UPDATE scheduled_message t SET claimed_at = now() FROM first
WHERE t.id = first.id AND t.sender_id = $2
RETURNING t.id, t.conversation_id, t.words, t.claimed_at
"""  # noqa: S608 - a constant is put in


async def claim(db: Db, sender_id: UserId) -> DueScheduled | None:
    """Claim the first due message of a sender. Return None if there is none, if a claim of the sender is valid, or if
    another transaction has locked the sender.
    """
    async with db.transaction():
        if (sender_row := await db.fetchrow(SENDER, CLAIMED, sender_id)) is None:
            return None
        if (row := await db.fetchrow(CLAIM, CLAIMED, sender_id)) is None:
            return None
    (face,) = sender_row
    message_id, conversation_id, words, claimed_at = row
    try:
        said = msgspec.structs.asdict(_words_decoder.decode(words))
        frame = Send(conversation_id=conversation_id, message_id=message_id, **said)
    except (msgspec.ValidationError, RecursionError, ValueError):
        frame = None
    sender = None if face is None else _user_decoder.read(face)
    return DueScheduled(message_id, conversation_id, sender_id, sender, frame, claimed_at)


# A claim may expire while its worker waits. Another worker may then take the message, and the owner may change or
# cancel it. So these statements require the worker's own claim.
PUT_OFF = f"""
WITH touched AS ({MOVE_OWN} RETURNING version)
UPDATE scheduled_message s SET claimed_at = NULL, not_before = now() + $4::interval, user_version = t.version
FROM touched t WHERE s.id = $1 AND s.status = 'waiting' AND s.claimed_at = $3
"""  # noqa: S608 - MOVE_OWN is a constant
FINISH = f"""
WITH touched AS ({MOVE_OWN} RETURNING version)
UPDATE scheduled_message s SET status = $4, problem = $5, not_before = NULL, user_version = t.version
FROM touched t WHERE s.id = $1 AND s.status = 'waiting' AND s.claimed_at = $3
RETURNING true
"""  # noqa: S608 - MOVE_OWN is a constant


async def put_off(db: Db, due: DueScheduled, wait: timedelta) -> None:
    """Defer a claimed message by at least `CLAIMED`. Later messages in its conversation wait until it was sent.

    It has no claim meanwhile, so its owner may change or cancel it. Does nothing if the claim is lost.
    """
    await db.execute(PUT_OFF, due.message_id, due.sender_id, due.claimed_at, max(wait, CLAIMED))


async def finish(db: Db, due: DueScheduled, status: ScheduledStatus, problem: str | None = None) -> None:
    """Store the result of a claimed message. Raises ClaimLost, which rolls back the message that was stored in the same
    transaction.
    """
    if not await db.fetchval(FINISH, due.message_id, due.sender_id, due.claimed_at, status, problem):
        raise ClaimLost


# Users whom another transaction has locked are left to a later run. Devices with an earlier user version start over.
FORGET = """
WITH due AS MATERIALIZED (
    SELECT s.id, s.sender_id FROM scheduled_message s
    WHERE s.status <> 'waiting' AND s.send_at < now() - $1::interval ORDER BY s.send_at LIMIT $2
), held AS MATERIALIZED (
    SELECT u.id FROM "user" u WHERE u.id IN (SELECT sender_id FROM due) ORDER BY u.id FOR NO KEY UPDATE SKIP LOCKED
), gone AS (
    DELETE FROM scheduled_message s USING due, held
    WHERE s.id = due.id AND held.id = due.sender_id AND s.status <> 'waiting'
    RETURNING s.sender_id, s.user_version
), moved AS (
    UPDATE "user" u SET forgotten_version = greatest(u.forgotten_version, g.version)
    FROM (SELECT sender_id, max(user_version) AS version FROM gone GROUP BY 1) g WHERE u.id = g.sender_id
)
SELECT count(*) FROM gone
"""


async def forget(db: Db) -> bool:
    """Delete messages that were sent, failed or were cancelled long ago, at most `MAX_DELETED`. Return whether there
    may be more.
    """
    return int(await db.fetchval(FORGET, KEPT, MAX_DELETED)) == MAX_DELETED
