"""Messages: found, read in pages."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

from protocol.ids import ConversationId, MessageId, UserId
from protocol.limits import MAX_PAGE_BYTES
from protocol.server import MessagePage, OneMessage
from protocol.values import Conversation, Message, Participant
from server.db.database import Db
from server.db.rows import Reader, Undecoded, fitting
from server.queries.locks import LOCK_PART

_one_decoder = Reader(OneMessage)
_message_decoder = Reader(Message)
_participant_decoder = Reader(Participant)
_conversation_decoder = Reader(Conversation)

NEWEST = 2**62
"""An anchor after every message."""


VISIBLE = """FROM message m
JOIN conversation c ON c.id = m.conversation_id AND NOT c.is_deleted
JOIN conversation_participant p ON p.conversation_id = m.conversation_id AND p.user_id = $2 AND p.status = 'active'
WHERE m.id = $1 AND (m.conversation_id = $3) IS TRUE AND m.sent_version > visible_after(c, p)"""
"""The message $1 of the conversation $3, if the user $2 takes part in it and may see that far back."""
WITHHELD = """CASE WHEN {message}.is_moderated AND ({message}.sender_id = $2
    OR can(p.role, 'moderator', p.can_delete_messages)) THEN {message}.content END"""
"""What a moderator has hidden, for the participant `p`, who is the user $2."""


class MessageRef(Protocol):
    """What names a message: every frame about one does."""

    @property
    def conversation_id(self) -> ConversationId:
        """Where it is."""

    @property
    def message_id(self) -> MessageId:
        """Which it is."""


class At(NamedTuple):
    """What names a message that no frame does."""

    conversation_id: ConversationId
    message_id: MessageId


Obstacle = Literal["inactive", "archived", "role", "unwanted", "slow"]
"""What keeps a participant from saying anything in a conversation: obstacle() in schema.sql."""


class FoundMessage(NamedTuple):
    """A message, the caller's part in its conversation, the conversation itself, and whether there are people there who
    may not see the message because they joined later, so that its words are not for everyone; what keeps the caller
    from saying anything there, and for how many milliseconds slow mode does.
    """

    message: Message
    me: Participant
    conversation: Conversation
    is_from_before: bool
    obstacle: Obstacle | None
    wait_ms: int


FIND = f"""
SELECT message_json(m), participant_json(p), conversation_json(c),
    coalesce(c.settings ->> 'history' = 'from_joining', false) AND m.sent_version <= c.access_version,
    obstacle(c, p), slow_mode_wait(c, p)
{VISIBLE}
"""


async def lock(db: Db, place: MessageRef, user_id: UserId) -> FoundMessage | None:
    """Lock the conversation of a message, and then return the message as it is, deleted or not; None without access.

    Locks nothing unless the user takes part.
    """
    if not await db.fetchval(LOCK_PART, place.conversation_id, user_id):
        return None
    return await find(db, place, user_id)


async def find(db: Db, place: MessageRef, user_id: UserId) -> FoundMessage | None:
    """Return a message as it is, deleted or not; None without access."""
    row = await db.fetchrow(FIND, place.message_id, user_id, place.conversation_id)
    if row is None:
        return None
    return FoundMessage(
        _message_decoder.decode(row[0]), _participant_decoder.decode(row[1]), _conversation_decoder.decode(row[2]),
        *row[3:],
    )  # fmt: skip


REACHED = """(
        SELECT count(*) FROM (
            SELECT FROM conversation_participant o
            WHERE o.conversation_id = m.conversation_id AND o.status = 'active'
                AND o.user_id <> m.sender_id AND {position} >= m.sent_version AND o.joined_version < m.sent_version
            LIMIT 1000
        ) o
    )"""
"""How many others the message `m` has reached, by a position of theirs; at most 1,000 are counted. Those who came
after the message have a position past it, and have not read it.
"""

GET = f"""
SELECT json_build_object(
    'type', 'message',
    'message', message_json(m),
    'withheld', {WITHHELD.format(message="m")},
    'mine', ARRAY(
        SELECT r.emoji FROM message_reaction r
        WHERE r.message_id = m.id AND (r.conversation_id = m.conversation_id) IS TRUE
            AND r.user_id = $2 AND NOT r.is_removed AND NOT m.is_deleted
        ORDER BY r.emoji
    ),
    'vote', CASE WHEN m.poll_voters > 0 THEN coalesce((
        SELECT v.options FROM poll_vote v
        WHERE v.message_id = m.id AND (v.conversation_id = m.conversation_id) IS TRUE AND v.user_id = $2
    ), '{{}}') ELSE '{{}}' END,
    'read_by', {REACHED.format(position="o.last_read_version")}
)
{VISIBLE}
"""  # noqa: S608 - VISIBLE is a constant


async def get(db: Db, place: MessageRef, user_id: UserId) -> OneMessage | None:
    """Return a message with the caller's reactions and how many have read it (at most 1,000 are counted)."""
    text = await db.fetchval(GET, place.message_id, user_id, place.conversation_id)
    return None if text is None else _one_decoder.decode(text)


# $3 is the anchor, whose place ($4 past it, or $4 itself when there is none) divides what is older from what
# is not. A participant gets at least one row, empty if need be: no row means no access.
_PAGE = f"""
SELECT c.version, anchor.place, page.is_older, message_json(page.m), {WITHHELD.format(message="(page.m)")}, ARRAY(
    SELECT r.emoji FROM message_reaction r
    WHERE (page.m).reactions <> '{{{{}}}}' AND r.message_id = (page.m).id AND (r.conversation_id = $1) IS TRUE
        AND r.user_id = $2 AND NOT r.is_removed
    ORDER BY r.emoji
), CASE WHEN (page.m).poll_voters > 0 THEN (
    SELECT v.options FROM poll_vote v
    WHERE v.message_id = (page.m).id AND (v.conversation_id = $1) IS TRUE AND v.user_id = $2
) END
FROM conversation_participant p
JOIN conversation c ON c.id = p.conversation_id AND NOT c.is_deleted
CROSS JOIN LATERAL ({{anchor}}) anchor
LEFT JOIN LATERAL (
    (SELECT m, true AS is_older FROM message m
        WHERE {{within}} AND m.{{place}} < anchor.place AND m.sent_version > visible_after(c, p)
        ORDER BY m.{{place}} DESC LIMIT $5)
    UNION ALL
    (SELECT m, false FROM message m
        WHERE {{within}} AND m.{{place}} >= anchor.place AND m.sent_version > visible_after(c, p)
        ORDER BY m.{{place}} LIMIT $6)
) page ON true
WHERE p.conversation_id = $1 AND p.user_id = $2 AND p.status = 'active'
"""  # noqa: S608 - only column references are put in
_ANCHOR = """SELECT $4::bigint + CASE WHEN $3::uuid IS NULL THEN 0
        ELSE (
            SELECT a.sent_version FROM message a
            WHERE a.id = $3 AND (a.conversation_id = $1) IS TRUE AND a.sent_version > visible_after(c, p)
        ) END AS place"""
PAGE = _PAGE.format(anchor=_ANCHOR, within="m.conversation_id = $1", place="sent_version")
TIMELINE = _PAGE.format(
    anchor=_ANCHOR,
    within="m.conversation_id = $1 AND (m.thread_root_id IS NULL OR m.also_in_conversation)",
    place="sent_version",
)
"""The same without replies that stand in their threads alone."""
# The root has to be there, and to be visible, for a place in its thread.
REPLIES = _PAGE.format(
    anchor="""SELECT $4::bigint AS place FROM message a
        WHERE a.id = $3 AND (a.conversation_id = $1) IS TRUE AND a.sent_version > visible_after(c, p)""",
    within="m.thread_root_id = $3 AND (m.conversation_id = $1) IS TRUE",
    place="thread_order",
)
"""The same within the thread that begins with $3, by the places in it."""


class Span(NamedTuple):
    """Which messages: up to `older` before the anchor, and up to `newer` from it on (after it, if `is_after`)."""

    anchor: MessageId | None
    older: int
    newer: int
    is_after: bool = False


async def page(
    db: Db, conversation_id: ConversationId, user_id: UserId, span: Span, *, with_replies: bool
) -> Undecoded[MessagePage] | None:
    """Return the messages of `span`, oldest first; None without access.

    Raises LookupError if the anchor is not a message of the conversation.
    """
    offset = NEWEST if span.anchor is None else int(span.is_after)
    query = PAGE if with_replies else TIMELINE
    rows = await db.fetch(query, conversation_id, user_id, span.anchor, offset, *_limits(span))
    return _page(rows, span, is_open=span.anchor is None)


async def replies(
    db: Db, place: MessageRef, user_id: UserId, span: Span, *, order: int
) -> Undecoded[MessagePage] | None:
    """Return the replies of `span` around a place in the thread of its anchor, oldest first; None without access."""
    rows = await db.fetch(REPLIES, place.conversation_id, user_id, place.message_id, order, *_limits(span))
    return _page(rows, span, is_open=order == NEWEST or (not span.older and order == 1))


def _limits(span: Span) -> list[int]:
    # One more than asked, on each side asked for, tells whether there is more.
    return [count and count + 1 for count in (span.older, span.newer)]


def _page(rows: Sequence[Any], span: Span, *, is_open: bool) -> Undecoded[MessagePage] | None:
    if not rows:
        return None
    version, place = rows[0][:2]
    if place is None:
        raise LookupError
    older = [tuple(beside) for _, _, is_older, *beside in rows if is_older]
    newer = [tuple(beside) for _, _, is_older, *beside in rows if is_older is False]
    most = MAX_PAGE_BYTES // (2 if span.older and span.newer else 1)
    older_kept = fitting(older[: span.older], most)
    newer_kept = fitting(newer[: span.newer], most)
    kept = older[:older_kept][::-1] + newer[:newer_kept]

    def of(read: list[tuple[Message, Any]]) -> MessagePage:
        beside = [(message.id, *rest) for message, (_, *rest) in read]
        return MessagePage(
            version=version,
            messages=[message for message, _ in read],
            has_before=len(older) > older_kept if span.older else not is_open,
            has_after=len(newer) > newer_kept if span.newer else not is_open,
            withheld={message_id: withheld for message_id, withheld, _, _ in beside if withheld is not None},
            mine={message_id: mine for message_id, _, mine, _ in beside if mine},
            votes={message_id: vote for message_id, _, _, vote in beside if vote},
        )

    return _message_decoder.beside(kept).then(of)
