"""Moderation: messages hidden and shown again, and reports."""

from typing import NamedTuple

from protocol.client import DismissReport, ListReports, ReportMessage
from protocol.ids import MessageId, UserId, uuid7
from protocol.values import Message, Report
from server.db.database import Db
from server.db.rows import FIRST, Page, Reader, Undecoded
from server.queries.edits import find_anew

_message_decoder = Reader(Message)
_report_decoder = Reader(Report)

MODERATE = """
WITH bumped AS (
    UPDATE conversation SET version = version + 1 WHERE id = $1 RETURNING version
)
UPDATE message m SET is_moderated = true, moderation_reason = $4, moderated_by = $3, moderated_at = now(),
    version = b.version, updated_at = now()
FROM bumped b WHERE m.id = $2 AND (m.conversation_id = $1) IS TRUE
RETURNING message_json(m)
"""
UNMODERATE = """
WITH bumped AS (
    UPDATE conversation SET version = version + 1 WHERE id = $1 RETURNING version
)
UPDATE message m SET is_moderated = false, moderation_reason = NULL, moderated_by = NULL, moderated_at = NULL,
    version = b.version, updated_at = now()
FROM bumped b WHERE m.id = $2 AND (m.conversation_id = $1) IS TRUE
RETURNING message_json(m)
"""


async def moderate(db: Db, found: Message, user_id: UserId, reason: str) -> Message:
    """Hide a message, and return it as all participants see it. Requires the conversation's lock. `uphold` follows."""
    text = await db.fetchval(MODERATE, found.conversation_id, found.id, user_id, reason)
    await find_anew(db, found.conversation_id, found.id)
    return _message_decoder.decode(text)


MAX_RESOLVED = 100
"""Max reports that one statement resolves."""
# A message may have any number of reports. So this runs in portions, without the conversation's lock.
UPHOLD = """
WITH due AS MATERIALIZED (
    SELECT o.id FROM report o
    WHERE o.message_id = $2 AND (o.conversation_id = $1) IS TRUE AND (o.status = 'open') IS TRUE
    LIMIT $4 FOR UPDATE SKIP LOCKED
)
UPDATE report r SET status = 'upheld', resolved_by = $3, resolved_at = now()
FROM due JOIN message m ON m.id = $2 AND (m.conversation_id = $1) IS TRUE AND m.is_moderated
WHERE r.id = due.id
RETURNING 1
"""


async def uphold(db: Db, found: Message, user_id: UserId) -> bool:
    """Uphold some of the reports about a hidden message. Return whether there may be more."""
    return len(await db.fetch(UPHOLD, found.conversation_id, found.id, user_id, MAX_RESOLVED)) == MAX_RESOLVED


async def unmoderate(db: Db, found: Message, *, words: str | None) -> Message:
    """Show a message again, and return it. Requires the conversation's lock. `words` is the message's index entry, if
    it is known.
    """
    text = await db.fetchval(UNMODERATE, found.conversation_id, found.id)
    await find_anew(db, found.conversation_id, found.id, words=words)
    return _message_decoder.decode(text)


REPORT = """
INSERT INTO report (id, conversation_id, message_id, reporter_id, reason)
SELECT $5, $1, m.id, $3, $4 FROM message m WHERE m.id = $2 AND (m.conversation_id = $1) IS TRUE
ON CONFLICT (message_id, reporter_id) DO NOTHING
"""


async def report(db: Db, frame: ReportMessage, user_id: UserId) -> None:
    """Store a user's report of a message. A second report of the same user changes nothing."""
    await db.execute(REPORT, frame.conversation_id, frame.message_id, user_id, frame.reason, uuid7())


_REPORT = """json_build_object('id', r.id, 'conversation_id', r.conversation_id, 'message_id', r.message_id,
    'sender_id', m.sender_id, 'content', m.content, 'reporter_id', r.reporter_id, 'reason', r.reason,
    'status', r.status, 'resolved_by', r.resolved_by, 'resolved_at', r.resolved_at, 'created_at', r.created_at)"""
READ_AT_ONCE = 1_000
"""Max reports that one page reads, including those about the reader's own messages."""
# Reports about the reader's own messages are skipped before the last LIMIT, so that neither a short page nor its end
# reveals them. A report about a message from before the reader's visible history is left out after the LIMIT. If the
# message is missing, its time is unknown. `is_report_shown` in schema.sql has the same rule.
REPORTS = f"""
SELECT CASE WHEN visible_after(c, me) < coalesce(m.sent_version, 1) AND m.sender_id IS DISTINCT FROM $5
    THEN {_REPORT} END, r.id, r.place = {READ_AT_ONCE} FROM (
    SELECT o.*, row_number() OVER () AS place FROM (
        SELECT * FROM report WHERE conversation_id = $1 AND status = $2 AND id > $3
        ORDER BY id LIMIT {READ_AT_ONCE}
    ) o
) r
JOIN conversation c ON c.id = r.conversation_id
JOIN conversation_participant me ON me.conversation_id = c.id AND me.user_id = $5
LEFT JOIN message m ON m.id = r.message_id AND (m.conversation_id = r.conversation_id) IS TRUE
WHERE m.sender_id IS DISTINCT FROM $5 OR r.place = {READ_AT_ONCE}
ORDER BY r.id LIMIT $4
"""  # noqa: S608 - only constants are put in
ALL_REPORTS = f"""
SELECT CASE WHEN m.sender_id IS DISTINCT FROM $4 THEN {_REPORT} END, r.id, r.place = {READ_AT_ONCE} FROM (
    SELECT o.*, row_number() OVER () AS place FROM (
        SELECT * FROM report WHERE status = $1 AND id > $2 ORDER BY id LIMIT {READ_AT_ONCE}
    ) o
) r LEFT JOIN message m ON m.id = r.message_id
WHERE m.sender_id IS DISTINCT FROM $4 OR r.place = {READ_AT_ONCE}
ORDER BY r.id LIMIT $3
"""  # noqa: S608 - only constants are put in


async def reports(db: Db, frame: ListReports, user_id: UserId, *, limit: int) -> Undecoded[Page[Report]]:
    """Return up to `limit` reports of a conversation, without those about messages from before the user's visible
    history. Without a conversation, return reports of all. Reports about the user's own messages are skipped. They
    cause another page only if there are `READ_AT_ONCE`. There is no access check.
    """
    if frame.conversation_id is None:
        rows = await db.fetch(ALL_REPORTS, frame.status, frame.after or FIRST, limit + 1, user_id)
    else:
        rows = await db.fetch(REPORTS, frame.conversation_id, frame.status, frame.after or FIRST, limit + 1, user_id)
    page = _report_decoder.page(rows, limit)
    if not rows or not rows[-1][2] or len(rows) > limit:
        return page
    last = rows[-1][1]
    return page.then(lambda found: found if found.after is not None else Page(found.rows, last))


REPORTED = """
SELECT r.message_id, m.sender_id
FROM report r
JOIN conversation c ON c.id = r.conversation_id
JOIN conversation_participant me ON me.conversation_id = c.id AND me.user_id = $3
LEFT JOIN message m ON m.id = r.message_id AND (m.conversation_id = r.conversation_id) IS TRUE
WHERE r.id = $2 AND r.conversation_id = $1 AND visible_after(c, me) < coalesce(m.sent_version, 1)
    AND m.sender_id IS DISTINCT FROM $3
"""
DISMISS = """
UPDATE report r SET status = 'dismissed', resolved_by = $3, resolved_at = now()
WHERE r.id = $2 AND r.conversation_id = $1 AND r.status = 'open'
RETURNING true
"""


class Reported(NamedTuple):
    """The message of a report, and its sender if the message exists."""

    message_id: MessageId
    sender_id: UserId | None


async def reported(db: Db, frame: DismissReport, user_id: UserId) -> Reported | None:
    """Return the message of a report. Return None if the user sees no such report."""
    row = await db.fetchrow(REPORTED, frame.conversation_id, frame.report_id, user_id)
    return None if row is None else Reported(*row)


async def dismiss(db: Db, frame: DismissReport, user_id: UserId) -> bool:
    """Dismiss an open report. Return whether it was open. The caller has checked that the user sees it."""
    return bool(await db.fetchval(DISMISS, frame.conversation_id, frame.report_id, user_id))
