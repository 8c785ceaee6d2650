"""Messages: found, locked, and read in pages."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

from protocol.ids import ConversationId, MessageId, UserId
from protocol.limits import MAX_COUNTED_PARTICIPANTS, MAX_COUNTED_READERS, MAX_PAGE_BYTES
from protocol.roles import ROLES
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
"""An anchor after all messages."""


VISIBLE = """FROM message m
JOIN conversation c ON c.id = m.conversation_id AND NOT c.is_deleted
JOIN conversation_participant p ON p.conversation_id = m.conversation_id AND p.user_id = $2 AND p.status = 'active'
WHERE m.id = $1 AND (m.conversation_id = $3) IS TRUE AND m.sent_version > visible_after(c, p)"""
"""The message $1 of the conversation $3, if the user $2 participates and may see it."""
WITHHELD = """CASE WHEN {message}.is_moderated AND ({message}.sender_id = $2
    OR can(p.role, 'moderator', p.can_delete_messages)) THEN {message}.content END"""
"""The content of a hidden message, for its sender and for moderators. The participant `p` is the user $2."""


class MessageRef(Protocol):
    """The address of a message, which every frame about one has."""

    @property
    def conversation_id(self) -> ConversationId:
        """The id of its conversation."""

    @property
    def message_id(self) -> MessageId:
        """The id of the message."""


class At(NamedTuple):
    """The address of a message without a frame."""

    conversation_id: ConversationId
    message_id: MessageId


Obstacle = Literal["inactive", "archived", "role", "unwanted", "slow"]
"""Obstacles to sending in a conversation, as obstacle() in schema.sql returns them."""


class FoundMessage(NamedTuple):
    """A message with the caller's participation and the conversation. `is_from_before` tells that some participants
    joined later and may not see the message, so that events must not contain it. `obstacle` and `wait_ms` tell whether
    the caller may send.
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


async def lock(db: Db, ref: MessageRef, user_id: UserId) -> FoundMessage | None:
    """Lock the conversation of a message, and then return the message, deleted or not. Return None without access.

    Without participation, nothing is locked.
    """
    if not await db.fetchval(LOCK_PART, ref.conversation_id, user_id):
        return None
    return await find(db, ref, user_id)


async def find(db: Db, ref: MessageRef, user_id: UserId) -> FoundMessage | None:
    """Return a message, deleted or not. Return None without access."""
    row = await db.fetchrow(FIND, ref.message_id, user_id, ref.conversation_id)
    if row is None:
        return None
    return FoundMessage(
        _message_decoder.decode(row[0]), _participant_decoder.decode(row[1]), _conversation_decoder.decode(row[2]),
        *row[3:],
    )  # fmt: skip


COUNTED = f"""(
            SELECT o.* FROM unnest('{{{{{",".join(ROLES[::-1])}}}}}'::text[]) AS rank (role)
            CROSS JOIN LATERAL (
                SELECT o.* FROM conversation_participant o
                WHERE CASE WHEN o.status = 'active' THEN o.role END = rank.role
                    AND o.conversation_id = m.conversation_id
                ORDER BY o.joined_at, o.user_id LIMIT {MAX_COUNTED_PARTICIPANTS}
            ) o
            LIMIT {MAX_COUNTED_PARTICIPANTS}
        )"""  # noqa: S608 - numbers and names of roles are put in
"""The participants in the conversation of the message `m` who are counted. They are in the order of an index,
participant_role_idx, so PostgreSQL reads no others.
"""

REACHED = f"""(
        SELECT least(count(*), {MAX_COUNTED_READERS}) FROM {COUNTED} o
        WHERE o.user_id <> m.sender_id AND {{position}} >= m.sent_version AND o.joined_version < m.sent_version
    )"""  # noqa: S608 - numbers and names of roles are put in
"""The number of others whose position has reached the message `m`. Those who joined after the message have a later
position, and do not count.
"""

GET = f"""
SELECT json_build_object(
    'type', 'message',
    'version', c.version,
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


async def get(db: Db, ref: MessageRef, user_id: UserId) -> OneMessage | None:
    """Return a message with the caller's reactions, and the number of readers, up to 1,000."""
    text = await db.fetchval(GET, ref.message_id, user_id, ref.conversation_id)
    return None if text is None else _one_decoder.decode(text)


# $3 is the anchor. Its place, plus $4, divides older messages from the others. Without an anchor, $4 is that place. A
# participant gets at least one row, which may be empty, so no row means no access.
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
"""The same without replies that are visible in their threads only."""
# The root must exist and be visible.
REPLIES = _PAGE.format(
    anchor="""SELECT $4::bigint AS place FROM message a
        WHERE a.id = $3 AND (a.conversation_id = $1) IS TRUE AND a.sent_version > visible_after(c, p)""",
    within="m.thread_root_id = $3 AND (m.conversation_id = $1) IS TRUE",
    place="thread_order",
)
"""The same within the thread of the root $3, by the places in it."""


class Span(NamedTuple):
    """Selects messages: up to `older` before the anchor, and up to `newer` from the anchor on, or after it with
    `is_after`.
    """

    anchor: MessageId | None
    older: int
    newer: int
    is_after: bool = False


async def page(
    db: Db, conversation_id: ConversationId, user_id: UserId, span: Span, *, with_replies: bool
) -> Undecoded[MessagePage] | None:
    """Return the messages of `span`, oldest first. Return None without access.

    Raises LookupError if the anchor is not a message of the conversation.
    """
    offset = NEWEST if span.anchor is None else int(span.is_after)
    query = PAGE if with_replies else TIMELINE
    rows = await db.fetch(query, conversation_id, user_id, span.anchor, offset, *_limits(span))
    return _page(rows, span, is_open=span.anchor is None)


async def replies(db: Db, ref: MessageRef, user_id: UserId, span: Span, *, order: int) -> Undecoded[MessagePage] | None:
    """Return the replies of `span` around a place in a thread, oldest first. Return None without access."""
    rows = await db.fetch(REPLIES, ref.conversation_id, user_id, ref.message_id, order, *_limits(span))
    return _page(rows, span, is_open=order == NEWEST or (not span.older and order == 1))


def _limits(span: Span) -> list[int]:
    # One more than requested on each side tells whether there are more.
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
