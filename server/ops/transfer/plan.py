"""The plan of an import from another chat: the rows to create, and notes on what is left out.

Ids derive from the keys in the export (origin.py), so a second import of the same archive changes nothing. An existing
conversation is not changed.
"""

from itertools import islice
from typing import Any, NamedTuple

import msgspec

from protocol.ids import ConversationId, UserId
from protocol.limits import visible
from server.db.database import Db
from server.ops.transfer.archive import Archive, ArchivePerson, ArchivePlace, require_different
from server.ops.transfer.conversation_rows import ConversationRows, becomes_message
from server.ops.transfer.lines import Lines, Row, RowLine
from server.ops.transfer.matches import MatchedPeople, match_people
from server.ops.transfer.origin import Origin
from server.ops.transfer.reading import reading
from server.queries import transfers

MESSAGES_PER_LOOKUP = 10_000
"""Max messages that one statement looks up."""
SAMPLE = 100
"""Max messages of a conversation that are looked up, to find out whether it is the same."""

_encode = msgspec.json.Encoder().encode


class Unnamed(Exception):  # noqa: N818 - it asks the operator
    """An earlier import has something with the same key, and nothing tells whether it is the same."""

    def __init__(self, archive: Archive, what: str) -> None:
        super().__init__(
            f"{what}. The export does not name its server. If both come from the same one, use --source "
            f"{archive.kind}; otherwise use --source NAME, with the same name in each import from this server."
        )


class Plan(NamedTuple):
    """The rows of an archive, and notes on parts that become no rows. The notes are complete when all rows
    were read.
    """

    rows: Lines
    notes: list[str]


async def plan(db: Db, archive: Archive, *, source: str | None = None, confirmed: str | None = None) -> Plan:
    """Return the rows of an archive. `source` is the operator's name of its server.

    Raises UnconfirmedMatches if people match accounts with unverified addresses, unless `confirmed` is `OTHERS` or the
    confirmation of these matches. Raises Unnamed if the archive may come from another server than an earlier import,
    and has no source. Raises ValueError if two of its people or conversations are the same.
    """
    require_different("people", [(person.key, person.key, person.found) for person in archive.people])
    require_different("conversations", [(place.key, place.key, place.found) for place in archive.places])
    origin = await Origin.of(db, archive.kind, source or archive.source or archive.kind)
    is_named = source is not None or archive.source is not None
    who = await match_people(db, archive, origin, confirmed)
    ids = {place.key: ConversationId(origin.made_id(place.created_at_ms, place.key)) for place in archive.places}
    there = await transfers.there(db, list(ids.values()))
    taken = await transfers.pairs(db, list(who.users.values()))
    wanted, notes = [], [*archive.notes, *who.notes]
    for place in archive.places:
        pair = tuple(sorted({who.users[key] for key in place.members if key in who.users}))
        if ids[place.key] not in there and not (place.kind == "direct" and pair in taken):
            wanted.append(place)
            continue
        if ids[place.key] in there and not (is_named or await _is_same(db, origin, place, who.users)):
            raise Unnamed(archive, f"{place.found}: an earlier import has a conversation {place.key}, too")
        why = "this conversation" if ids[place.key] in there else "a direct conversation of these two users"
        absent = await _absent(db, origin, place, who.users)
        notes.append(
            f"{place.found}: {why} exists already and was not changed"
            + (f". Messages that it lacks, and that were left out: {absent:,}" if absent else "")
        )
    if not is_named and (unknown := who.unknown & {key for place in wanted for key in place.members}):
        raise Unnamed(
            archive, f"{min(unknown)} has no e-mail address, and an earlier import has a user with the same id"
        )
    return Plan(_rows(archive, wanted, who, _Ids(origin, ids), notes), notes)


async def _is_same(db: Db, origin: Origin, place: ArchivePlace, users: dict[str, UserId]) -> bool:
    """Whether an existing conversation has messages of the archive's conversation, or the latter has none."""
    with reading(place.found):
        found = place.posts()
    posts = sorted((post for post in found if becomes_message(post, users)), key=lambda post: post.at_ms)
    messages = [origin.message_id(place, post) for post in posts[:SAMPLE]]
    return not messages or await transfers.is_any_message(db, messages)


async def _absent(db: Db, origin: Origin, place: ArchivePlace, users: dict[str, UserId]) -> int:
    """Return the number of messages of the archive's conversation that do not exist here."""
    with reading(place.found):
        found = place.posts()
    messages = {origin.message_id(place, post) for post in found if becomes_message(post, users)}
    wanted, absent = iter(messages), 0
    while some := list(islice(wanted, MESSAGES_PER_LOOKUP)):
        absent += await transfers.absent_messages(db, some)
    return absent


class _Ids(NamedTuple):
    """The origin of derived ids, and the ids of conversations."""

    origin: Origin
    places: dict[str, ConversationId]


def _rows(archive: Archive, places: list[ArchivePlace], who: MatchedPeople, ids: _Ids, notes: list[str]) -> Lines:
    for person in archive.people:
        if person.key in who.new:
            yield _line("user", _user(person, who.users[person.key], who.new[person.key]), person.found)
    for place in places:
        made = ConversationRows(ids.origin, place, who, ids.places[place.key])
        tables = made.rows()
        if not tables:
            notes.append(f"{place.found}: all participants are erased, so the conversation was left out")
        for table, rows in tables.items():
            yield from (_line(table, row, found) for row, found in rows)
        if made.left_out:
            notes.append(
                f"{place.found}: messages without text, of bots, or of people who are not in the export were left "
                f"out: {made.left_out:,}"
            )
        if made.repeated:
            notes.append(f"{place.found}: messages with the id of another message were left out: {made.repeated:,}")


def _line(table: str, row: dict[str, Any], found: str) -> RowLine:
    return RowLine(Row(table, msgspec.Raw(_encode(row))), found)


def _user(person: ArchivePerson, user_id: UserId, email: str) -> dict[str, Any]:
    return {
        "id": user_id,
        "name": (visible(person.name) or person.key)[:255],
        "display_name": visible(person.display_name or "")[:255] or None,
        "email": email,
        "is_active": person.is_active,
    }
