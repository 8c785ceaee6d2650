"""Accounts: passwords, states, and lists for administrators."""

from datetime import datetime
from typing import NamedTuple

import msgspec

from protocol.ids import SessionId, UserId
from protocol.values import User
from server.db.database import Db
from server.db.rows import Page, Reader, Undecoded
from server.queries.users import FACE

_user_decoder = Reader(User)

NAMES = """SELECT u.id, u.name FROM "user" u WHERE u.id = ANY($1)"""


async def names(db: Db, user_ids: list[UserId]) -> dict[UserId, str]:
    """Return the names of users."""
    return {row[0]: row[1] for row in await db.fetch(NAMES, user_ids)}


REGISTER = """
WITH made AS (INSERT INTO "user" (name, email) VALUES ($1, $2) RETURNING id)
INSERT INTO account (user_id, provider_id, account_id, password)
SELECT id, 'credential', $2, $3 FROM made RETURNING user_id
"""


async def register(db: Db, name: str, email: str, password_hash: str) -> UserId:
    """Create a user with a password. Raises UniqueViolationError if the e-mail address is taken."""
    return UserId(await db.fetchval(REGISTER, name, email, password_hash))


class Login(NamedTuple):
    """A user, and the hash of the password."""

    user: User
    password_hash: str


FIND = f"""
SELECT {FACE}, a.password
FROM account a JOIN "user" u ON u.id = a.user_id AND NOT u.is_disabled AND u.erased_at IS NULL
WHERE a.provider_id = 'credential' AND a.account_id = $1 AND a.password IS NOT NULL
"""  # noqa: S608 - FACE is a constant


async def find(db: Db, email: str) -> Login | None:
    """Return the user who logs in with this e-mail address."""
    row = await db.fetchrow(FIND, email)
    return None if row is None else Login(_user_decoder.decode(row[0]), row[1])


ADDRESS = "SELECT account_id FROM account WHERE provider_id = 'credential' AND user_id = $1 LIMIT 1"


async def address(db: Db, user_id: UserId) -> str | None:
    """Return the e-mail address of a user's login, or None without a password."""
    found: str | None = await db.fetchval(ADDRESS, user_id)
    return found


HASH = "SELECT password FROM account WHERE provider_id = 'credential' AND user_id = $1"


async def password_hash(db: Db, user_id: UserId) -> str | None:
    """Return the hash of a user's password, or None."""
    found: str | None = await db.fetchval(HASH, user_id)
    return found


# A password is checked outside transactions, because that takes long. So each statement below repeats the check that
# the hash is still the user's. It requires the user's lock, which every change of the hash takes, too.
_HAS_HASH = """EXISTS (
    SELECT FROM account a WHERE a.user_id = u.id AND a.provider_id = 'credential' AND a.password = $2
)"""

LEAVE = f"""
UPDATE "user" u SET is_active = false, is_deleted = $3, deleted_at = CASE WHEN $3 THEN now() END, updated_at = now(),
    version = version + 1
WHERE u.id = $1 AND u.erased_at IS NULL AND {_HAS_HASH}
    AND EXISTS (SELECT FROM session s WHERE s.id = $4 AND s.user_id = u.id AND s.expires_at > now())
RETURNING true
"""  # noqa: S608 - a constant is put in


async def leave(
    db: Db, user_id: UserId, password_hash: str | None, *, session_id: SessionId, is_for_good: bool
) -> bool:
    """Deactivate a user from one of the user's sessions, or mark the user to be erased after the grace period. Requires
    the user's lock.

    Return False, without an effect, if `password_hash` is no longer the user's, or if the session has ended.
    """
    return bool(await db.fetchval(LEAVE, user_id, password_hash, is_for_good, session_id))


COME_BACK = f"""
UPDATE "user" u SET is_active = true, is_deleted = false, deleted_at = NULL, updated_at = now(), version = version + 1
WHERE u.id = $1 AND u.erased_at IS NULL AND NOT u.is_disabled AND (NOT u.is_active OR u.is_deleted) AND {_HAS_HASH}
RETURNING true
"""  # noqa: S608 - as above


async def come_back(db: Db, user_id: UserId, password_hash: str) -> bool:
    """Undo `leave` if `password_hash` is still the user's. Return whether there was anything to undo. Requires the
    user's lock.
    """
    return bool(await db.fetchval(COME_BACK, user_id, password_hash))


CHANGE = """
WITH changed AS (
    UPDATE account c SET password = $3, updated_at = now()
    FROM "user" u
    WHERE c.provider_id = 'credential' AND c.user_id = u.id AND c.password = $2
        AND u.id = $1 AND u.is_active AND NOT u.is_deleted AND NOT u.is_disabled AND u.erased_at IS NULL
        AND EXISTS (SELECT FROM session s WHERE s.id = $4 AND s.user_id = u.id AND s.expires_at > now())
    RETURNING c.user_id
), ended AS (
    DELETE FROM session s USING changed c WHERE s.user_id = c.user_id AND s.id <> $4
)
SELECT EXISTS (SELECT FROM changed)
"""


async def change_password(
    db: Db, user_id: UserId, new_hash: str, *, instead_of: str | None, session_id: SessionId
) -> bool:
    """Change the password of an active user from one of the user's sessions, and end all others. Requires the user's
    lock.

    Return False, without an effect, if `instead_of` is no longer the hash of the user's password, or if the session has
    ended.
    """
    return bool(await db.fetchval(CHANGE, user_id, instead_of, new_hash, session_id))


NEW_HASH = """
UPDATE account SET password = $2, updated_at = now()
WHERE provider_id = 'credential' AND user_id = $1 AND password = $3
"""


async def set_password(db: Db, user_id: UserId, new_hash: str, *, instead_of: str) -> None:
    """Replace the hash of a password by another hash of the same password. Requires the user's lock."""
    await db.execute(NEW_HASH, user_id, new_hash, instead_of)


# An imported user has no account row yet. An erased user has none either, and must not get one.
GIVE = """
WITH given AS (
    UPDATE account SET password = $2, updated_at = now() WHERE provider_id = 'credential' AND user_id = $1
    RETURNING user_id
), made AS (
    INSERT INTO account (user_id, provider_id, account_id, password)
    SELECT u.id, 'credential', u.email, $2 FROM "user" u
    WHERE u.id = $1 AND NOT u.is_deleted AND u.erased_at IS NULL AND NOT EXISTS (SELECT FROM given)
    ON CONFLICT DO NOTHING
    RETURNING user_id
)
SELECT EXISTS (SELECT FROM given UNION ALL SELECT FROM made)
"""


async def give_password(db: Db, user_id: UserId, new_hash: str) -> bool:
    """Set the password of a user, with or without one. Return False, without an effect, if the user is erased or has no
    e-mail address for a login. Requires the user's lock.
    """
    return bool(await db.fetchval(GIVE, user_id, new_hash))


DISABLE = """
UPDATE "user" SET is_disabled = $2, is_active = NOT $2, updated_at = now(), version = version + 1
WHERE id = $1 AND erased_at IS NULL
"""


async def disable(db: Db, user_id: UserId, *, is_disabled: bool) -> None:
    """Disable a user's account, or enable it again."""
    await db.execute(DISABLE, user_id, is_disabled)


PROMOTE = """UPDATE "user" SET is_admin = $2, version = version + 1, own_version = version + 1 WHERE id = $1"""


async def promote(db: Db, user_id: UserId, *, is_admin: bool) -> None:
    """Make a user a server administrator, or revoke that."""
    await db.execute(PROMOTE, user_id, is_admin)


class AccountEntry(msgspec.Struct, frozen=True, kw_only=True):
    """An account in a list."""

    id: UserId
    name: str
    email: str
    state: str
    is_admin: bool
    created_at: datetime
    last_seen_at: datetime | None


class AccountCard(AccountEntry, frozen=True, kw_only=True):
    """An account as administrators see it."""

    sessions: int
    conversations: int


_entry_decoder = Reader(AccountEntry)
_card_decoder = Reader(AccountCard)

_STATE = """CASE WHEN u.erased_at IS NOT NULL THEN 'erased' WHEN u.is_disabled THEN 'disabled'
    WHEN u.is_deleted THEN 'deleted' WHEN NOT u.is_active THEN 'deactivated' ELSE 'active' END"""
_ENTRY = f"""'id', u.id, 'name', u.name, 'email', u.email, 'is_admin', u.is_admin, 'created_at', u.created_at,
    'last_seen_at', u.last_seen_at, 'state', {_STATE}"""

CARD = f"""
SELECT json_build_object({_ENTRY},
    'sessions', (SELECT count(*) FROM session s WHERE s.user_id = u.id AND s.expires_at > now()),
    'conversations', (SELECT count(*) FROM conversation_participant p WHERE p.user_id = u.id AND p.status = 'active'))
FROM "user" u WHERE u.id::text = $1 OR u.email = lower($1)
"""  # noqa: S608 - a constant is put in


async def card(db: Db, who: str) -> AccountCard | None:
    """Return an account by the user's id or e-mail address."""
    text = await db.fetchval(CARD, who)
    return None if text is None else _card_decoder.decode(text)


LIST = f"""
SELECT json_build_object({_ENTRY}), u.email
FROM "user" u
WHERE u.email > $1 AND (strpos(lower(u.name), lower($2)) > 0 OR strpos(lower(u.display_name), lower($2)) > 0
    OR strpos(u.email, lower($2)) > 0)
ORDER BY u.email LIMIT $3 + 1
"""  # noqa: S608 - a constant is put in


async def listed(db: Db, part: str, after: str, *, limit: int) -> Undecoded[Page[AccountEntry]]:
    """Return accounts with `part` in a name or in the address, sorted by address, after the address `after`."""
    return _entry_decoder.page(await db.fetch(LIST, after, part, limit), limit)
