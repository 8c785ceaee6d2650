"""The accounts of simulated users, created over HTTP."""

import secrets
from typing import NamedTuple, Self

import httpx
import msgspec

from loadtest.target import Unusable
from protocol.codec import encode
from protocol.http import LoggedIn, Login, Register
from protocol.ids import UserId

HTTP_SECONDS = 30.0


class Account(NamedTuple):
    """An account with a session."""

    url: str
    id: UserId
    name: str
    token: str
    email: str
    password: str

    @classmethod
    async def register(cls, url: str, name: str) -> Self:
        """Create an account at the server `url`. Raises Unusable if the server refuses."""
        email, password = f"{secrets.token_hex(6)}@prove.example", secrets.token_urlsafe(12)
        made = await _post(f"{url}/v1/auth/register", Register(name=name, email=email, password=password))
        if made is None:
            raise Unusable("the server refuses to create accounts. Check its limits (docs/prove.md).")
        return cls(url, made.user.id, name, made.token, email, password)

    async def log_in(self) -> str:
        """Return the token of a new session, or the old one if that fails."""
        made = await _post(f"{self.url}/v1/auth/login", Login(email=self.email, password=self.password))
        return self.token if made is None else made.token


async def _post(url: str, body: msgspec.Struct) -> LoggedIn | None:
    async with httpx.AsyncClient(trust_env=False, timeout=HTTP_SECONDS) as http:
        try:
            answer = await http.post(url, content=encode(body))
        except httpx.HTTPError:
            return None
    return msgspec.json.decode(answer.content, type=LoggedIn) if answer.is_success else None
