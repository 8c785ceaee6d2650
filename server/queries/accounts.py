"""Accounts: how a user logs in."""

from typing import NamedTuple

import msgspec

from protocol.ids import UserId
from protocol.values import User
from server.database import Db
from server.queries.users import FACE

_user_decoder = msgspec.json.Decoder(User)

REGISTER = """
WITH made AS (INSERT INTO "user" (name, email) VALUES ($1, $2) RETURNING id)
INSERT INTO account (user_id, provider_id, account_id, password)
SELECT id, 'credential', $2, $3 FROM made RETURNING user_id
"""


async def register(db: Db, name: str, email: str, password_hash: str) -> UserId:
    """Make a user who logs in with a password. Raises UniqueViolationError if the address is taken."""
    return UserId(await db.fetchval(REGISTER, name, email, password_hash))


class Login(NamedTuple):
    """A user and the hash of their password."""

    user: User
    password_hash: str


FIND = f"""
SELECT {FACE}, a.password
FROM account a JOIN "user" u ON u.id = a.user_id AND u.is_active AND NOT u.is_deleted
WHERE a.provider_id = 'credential' AND a.account_id = $1 AND a.password IS NOT NULL
"""  # noqa: S608 - FACE is a constant


async def find(db: Db, email: str) -> Login | None:
    """Return who logs in with this address."""
    row = await db.fetchrow(FIND, email)
    return None if row is None else Login(_user_decoder.decode(row[0]), row[1])


REHASH = "UPDATE account SET password = $2, updated_at = now() WHERE provider_id = 'credential' AND account_id = $1"


async def rehash(db: Db, email: str, password_hash: str) -> None:
    """Keep a password's hash made with today's parameters."""
    await db.execute(REHASH, email, password_hash)
