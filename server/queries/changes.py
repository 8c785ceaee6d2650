"""Changes in a conversation after a version, by one indexed read of each table with versions."""

from bisect import bisect_right
from collections.abc import Mapping
from itertools import groupby
from typing import NamedTuple
from uuid import UUID

import msgspec

from protocol.codec import encode
from protocol.ids import EVERYONE, ConversationId, MessageId, UserId
from protocol.limits import MAX_CHANGES_BYTES
from protocol.server import Changes, DurableEvent
from protocol.values import Receipt
from server.core.crowds import Change, Crowd
from server.db.database import Db
from server.db.rows import Reader, Undecoded
from server.queries.presence import UNSEEN
from server.queries.unread import COUNT_UNREAD

MANY = 4
"""Number of events that fit into a frame at any size."""

_event_decoder = Reader(DurableEvent)
_receipts_decoder = Reader(Receipt)

_CHANGED = """json_build_object('type', 'message_changed', 'conversation_id', {row}.conversation_id,
        'version', {row}.version, 'message_id', m.id)"""

# If new participants do not see earlier messages, clients fetch messages that some participant may not see. This
# includes deleted ones, because their remains name the sender, who deleted or hid them, and why.
_EVENTS = """
    (SELECT m.version, CASE WHEN {from_before} THEN {changed} ELSE json_build_object(
            'type', CASE WHEN m.is_deleted THEN 'message_deleted'
                WHEN m.sent_version > {since} THEN 'message_sent' ELSE 'message_edited' END,
            'conversation_id', m.conversation_id, 'version', m.version, 'message', message_json(m)
        ) END AS event, NULL::uuid AS gone
    FROM message m WHERE m.conversation_id = c.id AND m.version > {since} AND m.version < {until}
    ORDER BY m.version LIMIT {limit})
    UNION ALL
    (SELECT r.version, CASE WHEN {from_before} THEN {reacted} ELSE json_build_object(
            'type', CASE WHEN r.is_removed OR m.is_deleted THEN 'message_unreacted' ELSE 'message_reacted' END,
            'conversation_id', r.conversation_id, 'version', r.version, 'message_id', r.message_id,
            'user_id', r.user_id, 'emoji', r.emoji, 'count', coalesce((m.reactions ->> r.emoji)::int, 0)
        ) END, NULL
    FROM message_reaction r JOIN message m ON m.id = r.message_id AND (m.conversation_id = r.conversation_id) IS TRUE
    WHERE r.conversation_id = c.id AND r.version > {since} AND r.version < {until} ORDER BY r.version LIMIT {limit})
    UNION ALL
    (SELECT v.version, CASE WHEN {from_before} THEN {voted} ELSE json_build_object(
            'type', 'poll_voted', 'conversation_id', v.conversation_id, 'version', v.version,
            'message_id', v.message_id, 'poll_counts', coalesce(m.poll_counts, '{{}}'), 'poll_voters', m.poll_voters,
            'user_id', CASE WHEN m.payload @> '{{"is_anonymous": true}}' THEN NULL ELSE v.user_id END,
            'options', CASE WHEN m.payload @> '{{"is_anonymous": true}}' THEN NULL ELSE v.options END
        ) END, NULL
    FROM poll_vote v JOIN message m ON m.id = v.message_id AND (m.conversation_id = v.conversation_id) IS TRUE
    WHERE v.conversation_id = c.id AND v.version > {since} AND v.version < {until} AND m.payload IS NOT NULL
    ORDER BY v.version LIMIT {limit})
    UNION ALL
    (SELECT p.version, participant_event(p, c.participant_count), CASE WHEN p.status <> 'active' THEN p.user_id END
    FROM conversation_participant p
    WHERE CASE WHEN p.version > 0 THEN p.conversation_id END = c.id AND p.version > {since} AND p.version < {until}
    ORDER BY p.version LIMIT {limit})
    UNION ALL
    (SELECT p.left_version, participant_left_json(p, c.participant_count), p.user_id
    FROM conversation_participant p
    WHERE p.conversation_id = c.id AND p.left_version > {since} AND p.left_version < {until} AND p.left_version > 0
        AND p.left_version < p.version AND p.left_version > p.joined_version AND p.status <> 'active'
    ORDER BY p.left_version LIMIT {limit})
    UNION ALL
    SELECT c.settings_version, json_build_object(
            'type', 'conversation_updated', 'conversation_id', c.id, 'version', c.settings_version,
            'conversation', conversation_json(c)
        ), CASE WHEN c.is_deleted THEN '{everyone}'::uuid END
    WHERE c.settings_version > {since} AND c.settings_version < {until}
    ORDER BY 1 LIMIT {limit}
"""
"""Up to `{limit}` events of the conversation `c` between the versions `{since}` and `{until}`, in order, each with the
user who left by it.
"""

_FROM_BEFORE = "c.settings ->> 'history' = 'from_joining' AND m.sent_version <= c.access_version"
MESSAGE_BYTES = 1_000
"""Min bytes of a message in an event, besides its values of any length."""
BINARY_BYTES = 3_000
"""Max bytes that PostgreSQL needs for a JSON object beyond those of its text, for up to `MAX_JSON_VALUES` values."""
# PostgreSQL knows the lengths of values without reading them, so this costs a small part of the messages as JSON.
_SIZES = f"""
    SELECT m.version, CASE WHEN {_FROM_BEFORE} THEN 0 WHEN m.is_moderated THEN {MESSAGE_BYTES}
        ELSE {MESSAGE_BYTES} + octet_length(m.content) + coalesce(octet_length(m.formatted_content), 0)
            + coalesce(greatest(pg_column_size(m.payload) - {BINARY_BYTES}, 0), 0)
            + coalesce(greatest(pg_column_size(m.metadata) - {BINARY_BYTES}, 0), 0)
        END AS bytes
    FROM message m WHERE m.conversation_id = c.id AND m.version > {{since}} ORDER BY m.version LIMIT {{limit}}
"""  # noqa: S608 - only column references and constants are put in
"""The version and min bytes of up to `{limit}` changed messages of the conversation `c`, in order."""
_LAST = 2**63 - 1
"""A version after all others."""


def _since(*, since: str, until: str, limit: str, most: str) -> str:
    """Return a query for the conversation `c`. It returns one row, with all events of the first version, and then as
    many as fit, up to the version `until`. `found` is their number before that, and greater than it without those from
    `until` on.
    """
    events = _EVENTS.format(
        since=since,
        until=until,
        limit=limit,
        from_before=_FROM_BEFORE,
        changed=_CHANGED.format(row="m"),
        reacted=_CHANGED.format(row="r"),
        voted=_CHANGED.format(row="v"),
        everyone=EVERYONE,
    )
    return f"""
    SELECT coalesce(array_agg(e.version), '{{}}') AS versions, coalesce(array_agg(e.event), '{{}}') AS events,
        coalesce(array_agg(e.gone), '{{}}') AS gone, coalesce(max(e.found), 0) + ({until} < {_LAST})::int AS found,
        coalesce(max(e.bytes), 0) AS bytes
    FROM (
        SELECT s.* FROM (
            SELECT e.version, e.event::text AS event, e.gone, count(*) OVER () AS found,
                min(e.version) OVER () AS first,
                sum(octet_length(e.event::text)) OVER (ORDER BY e.version ROWS UNBOUNDED PRECEDING) AS bytes
            FROM ({events}) e
        ) s WHERE s.bytes <= {most} OR s.version = s.first
        ORDER BY s.version
    ) e
"""  # noqa: S608 - only names of parameters, column references and constants are put in


# Messages that begin after the max bytes are not made to JSON.
SINCE = f"""
SELECT c.version, e.versions, e.events, e.gone, e.found
FROM conversation c CROSS JOIN LATERAL (
    SELECT coalesce(min(s.version) FILTER (WHERE s.before > $4 AND s.version > s.first), {_LAST}) AS version FROM (
        SELECT s.version, min(s.version) OVER () AS first,
            sum(s.bytes) OVER (ORDER BY s.version ROWS UNBOUNDED PRECEDING) - s.bytes AS before
        FROM ({_SIZES.format(since="$2", limit="$3")}) s
    ) s
) until CROSS JOIN LATERAL ({_since(since="$2", until="until.version", limit="$3", most="$4")}) e WHERE c.id = $1
"""  # noqa: S608 - as above


class Difference(NamedTuple):
    """Changes up to a version, the users who left by them, the conversation's version, and the bytes of changes that
    were read.
    """

    changes: Changes
    gone: list[UserId]
    current_version: int
    size: int

    def parts(self, most: int) -> list[Changes] | None:
        """Return the changes in parts of at most `most` bytes, cut between versions. Return None if one version is
        larger.
        """
        events = self.changes.events
        if len(events) <= MANY:
            return [self.changes]
        parts: list[list[DurableEvent]] = [[]]
        size = 0
        for _, group in groupby(events, key=lambda event: event.version):
            together = list(group)
            more = sum(len(encode(event)) + 1 for event in together)
            if more > most:
                return None
            if size + more > most:
                parts.append([])
                size = 0
            parts[-1] += together
            size += more
        ends = [*(part[-1].version for part in parts[:-1]), self.changes.version]
        starts = [self.changes.since, *ends]
        return [
            msgspec.structs.replace(self.changes, since=start, version=end, events=part)
            for start, end, part in zip(starts, ends, parts, strict=False)
        ]

    def of_crowd(self, user_id: UserId) -> "Difference":
        """Return what a user receives of the changes of a crowd."""
        events = self.changes.events
        places, is_partial = Crowd([Change.of(encode(event)) for event in events]).delivered(user_id)
        some = msgspec.structs.replace(self.changes, events=[events[place] for place in places], is_partial=is_partial)
        return self._replace(changes=some)

    @property
    def is_whole(self) -> bool:
        """Whether the changes are complete."""
        return self.changes.version >= self.current_version


async def since(db: Db, conversation_id: ConversationId, version: int, *, limit: int) -> Undecoded[Difference] | None:
    """Return about `limit` changes after `version`, or as many as fit, cut where a version ends. Return None without
    such a conversation.

    There is no access check, because the hub delivers to participants only.
    """
    row = await db.fetchrow(SINCE, conversation_id, version, limit + 1, MAX_CHANGES_BYTES)
    return None if row is None else _difference(conversation_id, version, tuple(row), limit=limit)


def _difference(
    conversation_id: ConversationId,
    version: int,
    found: tuple[int, list[int], list[str], list[UUID | None], int],
    *,
    limit: int,
) -> Undecoded[Difference]:
    """`found` is the conversation's version, and the row of `_since`."""
    current_version, versions, events, left, count = found
    reached, end = max(current_version, version), len(versions)
    if end > limit or end < count:
        # The last version may have further events. If it is also the first, it is complete, if it fits.
        last = versions[-1] if versions else version + 1
        reached = last if versions and last == versions[0] and end <= limit else last - 1
        end = bisect_right(versions, reached)
    gone = [UserId(one) for one in left[:end] if one is not None]
    size = sum(map(len, events))

    def of(events: list[DurableEvent]) -> Difference:
        changes = Changes(conversation_id=conversation_id, since=version, version=reached, events=events)
        return Difference(changes, gone, current_version, size)

    return _event_decoder.each(events[:end]).then(of)


# One statement, so that each concurrent change is in all parts of the result or in none. Without the events of a
# conversation that do not fit, alone or besides those of the conversations before it. Most of those are not made to
# JSON, because their bytes or number are known before.
MISSED = f"""
SELECT m.id, m.last_read_message_id, m.last_read_version, m.unread_count, m.receipts, m.version,
    CASE WHEN m.fits THEN m.versions ELSE '{{}}' END AS versions,
    CASE WHEN m.fits THEN m.events ELSE '{{}}' END AS events,
    CASE WHEN m.fits THEN m.gone ELSE '{{}}' END AS gone, m.found
FROM (
    SELECT found.*, wanted.place = 1 OR sum(found.bytes) OVER (ORDER BY wanted.place) <= $5 AS fits
    FROM (
        SELECT s.id, s.since, s.place, CASE WHEN s.bytes IS NOT NULL AND sum(s.bytes) OVER (ORDER BY s.place) <= $5
            THEN {_LAST} ELSE 0 END AS until
        FROM (
            SELECT w.id, w.since, w.place, sizes.bytes
            FROM unnest($1::uuid[], $3::bigint[]) WITH ORDINALITY AS w (id, since, place) CROSS JOIN LATERAL (
                SELECT CASE WHEN count(s) < $6 AND coalesce(sum(s.bytes), 0) <= $5 THEN coalesce(sum(s.bytes), 0) END
                    AS bytes
                FROM conversation c CROSS JOIN LATERAL ({_SIZES.format(since="w.since", limit="$6")}) s
                WHERE c.id = w.id OFFSET 0
            ) sizes
        ) s OFFSET 0
    ) wanted
    CROSS JOIN LATERAL (
        SELECT c.id, c.version, me.last_read_message_id, me.last_read_version, CASE WHEN wanted.until > 0 THEN (
            {COUNT_UNREAD.format(me="me")}
        ) ELSE 0 END AS unread_count, CASE WHEN wanted.until > 0 AND c.participant_count <= $4 THEN coalesce((
            SELECT json_agg(json_build_object('user_id', p.user_id, 'message_id', p.last_read_message_id,
                'revision', CASE WHEN p.last_read_message_id IS NOT NULL THEN p.last_read_version ELSE 0 END,
                'delivered_message_id', CASE WHEN seen.is_shown THEN p.delivered_message_id END,
                'delivered_revision', CASE WHEN seen.is_shown THEN p.delivered_version ELSE 0 END))
            FROM conversation_participant p
            CROSS JOIN LATERAL (SELECT NOT p.user_id = ANY({UNSEEN}) AS is_shown OFFSET 0) seen
            WHERE p.conversation_id = c.id AND p.status = 'active'
                AND (p.last_read_message_id IS NOT NULL OR (seen.is_shown AND p.delivered_message_id IS NOT NULL))
        ), '[]') ELSE '[]' END AS receipts, e.*
        FROM conversation_participant me JOIN conversation c ON c.id = me.conversation_id AND NOT c.is_deleted
        CROSS JOIN LATERAL ({_since(since="wanted.since", until="wanted.until", limit="$6", most="$5")}) e
        WHERE me.conversation_id = wanted.id AND me.user_id = $2 AND me.status = 'active' OFFSET 0
    ) found
) m
"""  # noqa: S608 - only column references are put in


class Reading(NamedTuple):
    """The caller's read position, and those of others if these are shared."""

    last_read_message_id: MessageId | None
    last_read_revision: int
    unread_count: int
    receipts: list[Receipt]


class Missed(NamedTuple):
    """The changes of a conversation that a user has missed, and read positions."""

    difference: Undecoded[Difference]
    reading: Reading


async def missed(
    db: Db, user_id: UserId, versions: Mapping[ConversationId, int], *, limit: int, most: int
) -> dict[ConversationId, Missed]:
    """Return what `since` returns after each of these versions, and read positions, for the conversations in which the
    user participates.

    The conversations have equal shares of `limit`, and share the bytes. So with several conversations, the changes of
    some may not be whole, although they are if only one is given. Positions of others are included in conversations
    with at most `most` participants.
    """
    share = max(1, limit // max(1, len(versions)))
    rows = await db.fetch(MISSED, list(versions), user_id, list(versions.values()), most, MAX_CHANGES_BYTES, share + 1)
    found = {}
    for one, last_read, revision, unread_count, receipts, *changed in rows:
        reading = Reading(last_read, revision, unread_count, _receipts_decoder.every(receipts))
        difference = _difference(one, versions[one], tuple(changed), limit=share)
        found[one] = Missed(difference, reading)
    return found
