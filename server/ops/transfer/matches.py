"""The users that people in an archive become.

An equal name with another e-mail address is another user. Anybody may register any address. So a person becomes an
existing account only if its address is verified, or if an operator has confirmed the list of matches.
"""

import hashlib
from typing import NamedTuple
from uuid import uuid4

import msgspec

from protocol.http import canonical
from protocol.ids import UserId
from protocol.limits import Email
from server.db.database import Db
from server.ops.transfer.archive import Archive, ArchivePerson, require_different
from server.ops.transfer.origin import Origin
from server.queries import transfers
from server.queries.transfers import Account


class Match(NamedTuple):
    """A person in the archive, and the existing account with the same address."""

    person: ArchivePerson
    account: Account


OTHERS = "none"
"""The operator's answer if no match by an unverified address is the same person."""


def confirmation(matches: list[Match]) -> str:
    """Return the code that confirms exactly these matches. If another account took one of the addresses, the code would
    differ.
    """
    words = [f"{match.person.key} {match.account.email} {match.account.id}" for match in matches]
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:12]


class UnconfirmedMatches(Exception):  # noqa: N818 - it asks the operator
    """People match accounts with unverified addresses."""

    def __init__(self, matches: list[Match]) -> None:
        super().__init__("accounts match by unverified addresses")
        self.matches = matches


class MatchedPeople(NamedTuple):
    """The users that people become. `new` are created, with these addresses. `erased` exist here and are erased.
    `unknown` exist here without an e-mail address. `inactive` have accounts that are not active. `notes` report invalid
    addresses.
    """

    users: dict[str, UserId]
    new: dict[str, str]
    erased: set[str]
    unknown: set[str]
    inactive: set[str]
    notes: list[str]


async def match_people(db: Db, archive: Archive, origin: Origin, confirmed: str | None) -> MatchedPeople:
    """Match the people in an archive with existing accounts.

    Raises UnconfirmedMatches and ValueError, as `plan` does.
    """
    emails = {person.key: _address(person) for person in archive.people}
    require_different("people", [(emails[one.key], one.key, one.found) for one in archive.people if emails[one.key]])
    own = {key: UserId(origin.made_id(0, "user", key, email)) for key, email in emails.items()}
    accounts = await transfers.by_email(db, sorted(email for email in emails.values() if email))
    here = await transfers.present(db, list(own.values()))
    # Users whose id derives from the archive came with an earlier import, so their match was decided then.
    matches = [
        Match(person, accounts[emails[person.key]])
        for person in archive.people
        if emails[person.key] in accounts and own[person.key] not in here
    ]
    known = await _known(db, archive, origin, {match.person.key for match in matches})
    certain = {
        match.person.key: match.account.id
        for match in matches
        if match.account.is_verified or match.account.id in known[match.person.key]
    }
    unverified = [match for match in matches if match.person.key not in certain]
    if unverified and confirmed not in {OTHERS, confirmation(unverified)}:
        raise UnconfirmedMatches(unverified)
    matched = certain if confirmed == OTHERS else {match.person.key: match.account.id for match in matches}
    users = own | matched
    active = await transfers.active(db, list(users.values()))
    require_different("people", [(users[person.key], person.key, person.found) for person in archive.people])
    new = {
        key: emails[key] if emails[key] and emails[key] not in accounts else f"imported-{uuid4()}@invalid"
        for key in users if key not in matched and own[key] not in here
    }  # fmt: skip
    return MatchedPeople(
        users, new,
        erased={key for key in own if here.get(own[key])},
        unknown={key for key in own if own[key] in here and not emails[key]},
        inactive={one.key for one in archive.people if not active.get(users[one.key], one.is_active)},
        notes=[f"{one.found}: the e-mail address is invalid and was left out" for one in archive.people
               if one.email and not emails[one.key]],
    )  # fmt: skip


async def _known(db: Db, archive: Archive, origin: Origin, keys: set[str]) -> dict[str, set[UserId]]:
    """Return the accounts that people became in earlier imports, by their participation in the archive's
    conversations.
    """
    of = {origin.participant_id(place, key): key for place in archive.places for key in place.members if key in keys}
    known: dict[str, set[UserId]] = {key: set() for key in keys}
    for part_id, user_id in (await transfers.parts(db, list(of))).items():
        known[of[part_id]].add(user_id)
    return known


def _address(person: ArchivePerson) -> str:
    """Return a person's address in its stored form. Return an empty text if it is missing or invalid."""
    try:
        return canonical(msgspec.convert(person.email, Email)) if person.email else ""
    except msgspec.ValidationError:
        return ""
