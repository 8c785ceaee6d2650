"""The HTTP endpoints for accounts and sessions."""

import asyncpg
import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from protocol.codec import decode
from protocol.errors import ErrorCode, Refused
from protocol.http import Confirm, LoggedIn, Login, Register, SessionList
from protocol.ids import SessionId, UserId
from protocol.values import User
from server.addresses import address_of
from server.auth import passwords
from server.auth.attempts import Attempts
from server.auth.credentials import COOKIE, token_of
from server.auth.sessions import Sessions
from server.auth.tokens import new_token, token_hash
from server.context import Events
from server.database import Database
from server.errors import NotFound
from server.export import written
from server.limits import Allowance
from server.queries import accounts, sessions, users
from server.queries.sessions import Active
from server.web import JSON, endpoint, json_response, limited_body

_register = msgspec.json.Decoder(Register)
_login = msgspec.json.Decoder(Login)
_confirm = msgspec.json.Decoder(Confirm)
MAX_USER_AGENT = 255
EXPORTS_PER_SECOND, EXPORTS_AT_ONCE = 1 / 60, 3
"""How often one user may export their data from a worker."""


class Accounts:
    """Register, log in, log out, and see to one's sessions."""

    def __init__(
        self, database: Database, events: Events, *, sessions: Sessions, attempts: Attempts, origins: frozenset[str]
    ) -> None:
        self._database = database
        self._events = events
        self._sessions = sessions
        self._attempts = attempts
        self._origins = origins
        self._exports: Allowance[UserId] = Allowance(EXPORTS_PER_SECOND, burst=EXPORTS_AT_ONCE)

    def routes(self) -> list[Route]:
        """Return the routes under /v1/auth."""
        return [
            Route("/v1/auth/register", endpoint(self.register), methods=["POST"]),
            Route("/v1/auth/login", endpoint(self.login), methods=["POST"]),
            Route("/v1/auth/logout", endpoint(self.logout), methods=["POST"]),
            Route("/v1/auth/deactivate", endpoint(self.deactivate), methods=["POST"]),
            Route("/v1/auth/delete", endpoint(self.delete), methods=["POST"]),
            Route("/v1/auth/export", endpoint(self.export), methods=["GET"]),
            Route("/v1/auth/sessions", endpoint(self.list_sessions), methods=["GET"]),
            Route("/v1/auth/sessions", endpoint(self.revoke_all), methods=["DELETE"]),
            Route("/v1/auth/sessions/{session_id}", endpoint(self.revoke), methods=["DELETE"]),
        ]

    async def caller(self, request: Request) -> Active:
        """Return the session of a request. Raises Refused without one."""
        token = token_of(request, self._origins)
        if token is None:
            raise Refused(ErrorCode.UNAUTHENTICATED, "Log in, and send the token as `Authorization: Bearer`.")
        return await self._sessions.authenticate(token)

    async def register(self, request: Request) -> Response:
        """Make an account and begin its first session."""
        await self._attempts.of_address(address_of(request))
        body = decode(await limited_body(request), _register)
        email = body.email.lower()
        password_hash = await passwords.hashed(body.password)
        try:
            async with self._database.transaction() as db:
                user_id = await accounts.register(db, body.name, email, password_hash)
        except asyncpg.UniqueViolationError:
            raise Refused(ErrorCode.CONFLICT, "This e-mail address has an account already.", path="email") from None
        return await self._begin(request, User(id=user_id, name=body.name), status=201)

    async def login(self, request: Request) -> Response:
        """Begin a session."""
        await self._attempts.of_address(address_of(request))
        body = decode(await limited_body(request), _login)
        email = body.email.lower()
        await self._attempts.require_account(email)
        async with self._database.connection() as db:
            found = await accounts.find(db, email)
        if not await passwords.matches(body.password, None if found is None else found.password_hash) or found is None:
            await self._attempts.failed(email)
            raise Refused(ErrorCode.UNAUTHENTICATED, "The e-mail address and the password do not match.")
        await self._attempts.succeeded(email)
        if passwords.is_outdated(found.password_hash):
            new_hash = await passwords.hashed(body.password)
            async with self._database.connection() as db:
                await accounts.set_password(db, found.user.id, new_hash)
        if found.is_away:
            async with self._database.connection() as db:
                await accounts.come_back(db, found.user.id)
        return await self._begin(request, found.user, status=200)

    async def logout(self, request: Request) -> Response:
        """End the session of the request."""
        active = await self.caller(request)
        await self._revoke(active.user.id, active.session_id)
        response = Response(status_code=204)
        response.delete_cookie(COOKIE)
        return response

    async def deactivate(self, request: Request) -> Response:
        """Go away until the next login: nobody finds the user or writes to them."""
        return await self._leave(request, is_for_good=False)

    async def delete(self, request: Request) -> Response:
        """Go away for good: when the time of grace is over, in which logging in undoes it, the user is erased."""
        return await self._leave(request, is_for_good=True)

    async def _leave(self, request: Request, *, is_for_good: bool) -> Response:
        active = await self.caller(request)
        user_id = active.user.id
        body = decode(await limited_body(request), _confirm)
        await self._attempts.require_account(user_id.hex)
        async with self._database.connection() as db:
            there = await accounts.password_hash(db, user_id)
        if not await passwords.matches(body.password, there):
            await self._attempts.failed(user_id.hex)
            raise Refused(ErrorCode.FORBIDDEN, "This is not your password.", path="password")
        async with self._database.transaction() as db:
            await accounts.leave(db, user_id, is_for_good=is_for_good)
            await sessions.revoke(db, user_id, None)
        self._events.poke([user_id])
        self._events.reconsider(user_id)
        response = Response(status_code=204)
        response.delete_cookie(COOKIE)
        return response

    async def export(self, request: Request) -> Response:
        """Return everything that is stored about the user."""
        active = await self.caller(request)
        self._exports.require(active.user.id)
        return StreamingResponse(
            written(self._database.connection, active.user.id),
            media_type=JSON,
            headers={
                "cache-control": "no-store",
                "content-disposition": f'attachment; filename="openchat-{active.user.id}.json"',
            },
        )

    async def list_sessions(self, request: Request) -> Response:
        """Return the user's sessions."""
        active = await self.caller(request)
        async with self._database.connection() as db:
            mine = await sessions.of_user(db, active.user.id, active.session_id)
        return json_response(SessionList(sessions=mine))

    async def revoke(self, request: Request) -> Response:
        """End one of the user's sessions."""
        active = await self.caller(request)
        try:
            session_id = msgspec.convert(request.path_params["session_id"], SessionId)
        except msgspec.ValidationError:
            raise NotFound("session_id") from None
        if not await self._revoke(active.user.id, session_id):
            raise NotFound("session_id")
        return Response(status_code=204)

    async def revoke_all(self, request: Request) -> Response:
        """End all of the user's sessions, this one included."""
        active = await self.caller(request)
        await self._revoke(active.user.id, None)
        return Response(status_code=204)

    async def _revoke(self, user_id: UserId, session_id: SessionId | None) -> int:
        async with self._database.transaction() as db:
            count = await sessions.revoke(db, user_id, session_id)
            if count:
                await users.touch(db, [user_id])
        self._events.poke([user_id])
        return count

    async def _begin(self, request: Request, user: User, *, status: int) -> Response:
        token = new_token()
        device = (address_of(request), request.headers.get("user-agent", "")[:MAX_USER_AGENT].replace("\0", "") or None)
        async with self._database.connection() as db:
            session_id, expires_at = await sessions.create(db, user.id, token_hash(token), self._sessions.lasts, device)
        logged_in = LoggedIn(token=token, session_id=session_id, expires_at=expires_at, user=user)
        response = json_response(logged_in, status=status)
        response.set_cookie(
            COOKIE,
            token,
            max_age=int(self._sessions.lasts.total_seconds()),
            httponly=True,
            samesite="lax",
            secure=request.url.scheme == "https",
        )
        return response
