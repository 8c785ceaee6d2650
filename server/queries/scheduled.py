"""Scheduled messages: kept until their time, claimed by one worker, sent by the way of all messages."""

from datetime import UTC, datetime, timedelta
from typing import NamedTuple
from uuid import UUID

import msgspec

from protocol import json_object
from protocol.client import Schedule, Send
from protocol.ids import ConversationId, MessageId, UserId
from protocol.limits import MAX_PAGE
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
"""For how long a worker that has claimed a message may take before another one does."""
AT_ONCE = 50
"""Messages that one statement of `forget` deletes."""
WALKED = 500
"""Max messages that are due in a page of `walk`."""
KEPT = timedelta(days=366 + 2 * 30)
"""Min age of `send_at` of a message that is over before its row is deleted. An earlier copy of its frame may name a
time 366 days after the last one; and a frame that names a time 30 days ago is refused, so no late copy is sent again.
"""

GET = (
    "SELECT scheduled_json(s) FROM scheduled_message s WHERE s.id = $1 AND s.sender_id = $2 AND s.conversation_id = $3"
)
WAITING = "SELECT count(*) FROM scheduled_message s WHERE s.sender_id = $1 AND s.status = 'waiting'"


async def get(db: Db, message_id: MessageId, user_id: UserId, conversation_id: ConversationId) -> Scheduled | None:
    """Return what a user has scheduled under an id."""
    text = await db.fetchval(GET, message_id, user_id, conversation_id)
    return None if text is None else _scheduled_decoder.decode(text)


async def count(db: Db, user_id: UserId) -> int:
    """Return how many messages of a user wait. Under the user's lock."""
    return int(await db.fetchval(WAITING, user_id))


# Until a worker has taken it up; then it is too late. A worker that lost the answer of the database may have put off
# what was sent.
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
RETURNING scheduled_json(s)
"""  # noqa: S608 - constants are put in
CANCEL = f"""
WITH touched AS ({MOVE_OWN} RETURNING version)
UPDATE scheduled_message s SET status = 'cancelled', not_before = NULL, user_version = t.version FROM touched t
WHERE s.id = $1 AND s.status = 'waiting' AND {_WAITS}
RETURNING scheduled_json(s)
"""  # noqa: S608 - constants are put in


async def put(db: Db, frame: Schedule, user_id: UserId) -> Scheduled | None:
    """Keep a message until its time, or change one that waits; None if the id is taken, or it is too late. Under the
    user's lock.
    """
    text = await db.fetchval(PUT, frame.message_id, user_id, frame.conversation_id, _words(frame), frame.send_at)
    return None if text is None else _scheduled_decoder.decode(text)


# A message without words was sent, and its time was over (`edits.FORGET`): nobody schedules one.
IS_REPEATED = """
SELECT s.words IN ($4::jsonb, '{"content": ""}') AND s.send_at = $5 FROM scheduled_message s
WHERE s.id = $1 AND s.sender_id = $2 AND s.conversation_id = $3 AND s.status IN ('waiting', 'sent')
"""


async def is_repeated(db: Db, frame: Schedule, user_id: UserId) -> bool:
    """Whether a message that waits, or was sent, has the words and the time of a frame."""
    place = (frame.message_id, user_id, frame.conversation_id)
    return bool(await db.fetchval(IS_REPEATED, *place, _words(frame), frame.send_at))


def _words(frame: Schedule) -> str:
    return msgspec.json.encode(
        msgspec.convert(frame, Words, from_attributes=True, dec_hook=json_object.accept)
    ).decode()


async def cancel(db: Db, message_id: MessageId, user_id: UserId, conversation_id: ConversationId) -> Scheduled | None:
    """Do not send a message that waits; None if there is none, or it is too late. Under the user's lock."""
    text = await db.fetchval(CANCEL, message_id, user_id, conversation_id)
    return None if text is None else _scheduled_decoder.decode(text)


LIST = f"""
SELECT scheduled_json(s), {MOMENT.format(at="s.send_at")}, s.id
FROM scheduled_message s WHERE s.sender_id = $1 AND s.status IN ('waiting', 'failed')
    AND ($2::timestamptz IS NULL OR (s.send_at, s.id) < ($2, $3::uuid))
ORDER BY s.send_at DESC, s.id DESC LIMIT {MAX_PAGE + 1}
"""  # noqa: S608 - a column and a number are put in


async def page(db: Db, user_id: UserId, before: Cursor | None) -> Undecoded[Page[Scheduled]]:
    """Return a page of a user's messages that wait or could not be sent, the latest first."""
    return _scheduled_decoder.page(await db.fetch(LIST, user_id, *(before or (None, None))), MAX_PAGE, Cursor.of)


class DueScheduled(NamedTuple):
    """A message whose time has come."""

    message_id: MessageId
    conversation_id: ConversationId
    sender_id: UserId
    sender: User | None
    """None if they are not here any more, or cannot be read."""
    frame: Send | None
    """None if it cannot be read."""
    claimed_at: datetime
    """Identifies the claim: a later one has another time, and a message that was put off has none."""


class ClaimLost(Exception):  # noqa: N818 - another worker has the message now
    """The message was claimed again, put off, cancelled or finished meanwhile."""


class Waiting(NamedTuple):
    """A message that is due, in the order in which messages have their turns."""

    send_at: datetime
    message_id: MessageId
    sender_id: UserId


# Who has a turn is found by a walk along the index, a page at a time: one that began anew for each claim would pass all
# that is due of those who had a turn. IS TRUE keeps the planner from reading all that is due and sorting it.
_IS_FREE = """s.send_at <= now() AND (s.not_before IS NULL OR s.not_before <= now())
    AND (s.claimed_at IS NULL OR s.claimed_at < now() - $1::interval)"""
WALK = f"""
SELECT s.send_at, s.id, s.sender_id FROM scheduled_message s
WHERE s.status = 'waiting' AND (s.send_at, s.id) > ($2::timestamptz, $3::uuid) AND ({_IS_FREE}) IS TRUE
ORDER BY s.send_at, s.id LIMIT $4
"""  # noqa: S608 - a constant is put in


async def walk(db: Db, after: Waiting | None) -> list[Waiting]:
    """Return up to `WALKED` messages that are due and that nobody has claimed, those that are due first before others.
    `after` is the last one of the page before.
    """
    place = (datetime.min.replace(tzinfo=UTC), UUID(int=0)) if after is None else (after.send_at, after.message_id)
    return [Waiting(*row) for row in await db.fetch(WALK, CLAIMED, *place, WALKED)]


# One claim takes one message. A sender of whom a claim has not ended has no other one, so their messages are sent in
# order, and other senders' beside them. What was put off is not overtaken in its conversation.
# The sender's lock keeps their frames and other workers' claims away from all rows; a sender whose lock somebody else
# has comes later. `CLAIM` asks again under that lock: another worker may have committed a claim since `SENDER` began.
# Whoever deleted their account, or was locked out, says nothing any more.
# All that waits of the sender is read once: of messages for the same minute, each would be compared with all.
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
    """Take up the first message of a sender that is due. Return None if there is none, a claim of theirs has not ended,
    or another transaction holds the sender's row.
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


# A claim runs out while its worker waits: another one takes the message, and the owner may change or cancel it after
# that. So these statements act on the worker's own claim alone.
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
    """Have a message that was taken up wait for at least `CLAIMED`, and those behind it in its conversation until it
    was sent.

    Nobody has claimed it meanwhile: its owner may change or cancel it. Does nothing if the claim is lost.
    """
    await db.execute(PUT_OFF, due.message_id, due.sender_id, due.claimed_at, max(wait, CLAIMED))


async def finish(db: Db, due: DueScheduled, status: ScheduledStatus, problem: str | None = None) -> None:
    """Note what became of a message that was taken up. Raises ClaimLost, which rolls back the message that was stored
    in the same transaction.
    """
    if not await db.fetchval(FINISH, due.message_id, due.sender_id, due.claimed_at, status, problem):
        raise ClaimLost


# A user who is held by another transaction has their turn later. Their devices that were told less start over.
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
    """Delete messages that were sent, failed or were cancelled long ago, at most `AT_ONCE`; return whether there may be
    more.
    """
    return int(await db.fetchval(FORGET, KEPT, AT_ONCE)) == AT_ONCE
