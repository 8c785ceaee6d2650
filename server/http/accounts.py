"""The HTTP endpoints for accounts and sessions."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from protocol.codec import decode
from protocol.errors import ErrorCode, Refused
from protocol.http import ChangePassword, Confirm, LoggedIn, Login, Register, SessionList, canonical
from protocol.ids import SessionId, UserId
from protocol.limits import TOKEN_BYTES
from protocol.values import User
from server.auth import passwords
from server.auth.attempts import Attempts
from server.auth.sessions import Sessions
from server.auth.tokens import new_token, token_hash
from server.context import Events
from server.core.errors import NotFound
from server.core.faults import may_have_committed
from server.db.database import Database, Db
from server.domain.export import written
from server.gateway.responses import JSON, json_response
from server.http.credentials import forget_cookie, require_origin, set_cookie, token_of
from server.http.routing import endpoint, limited_body
from server.limits.per_address import address_of, key_of
from server.limits.shared_rate_limit import SharedRateLimit
from server.limits.token_bucket import TokenBuckets
from server.queries import accounts, sessions, users
from server.queries.accounts import Login as Found
from server.queries.sessions import Active, Beginning

_register = msgspec.json.Decoder(Register)
_login = msgspec.json.Decoder(Login)
_confirm = msgspec.json.Decoder(Confirm)
_change = msgspec.json.Decoder(ChangePassword)
MAX_USER_AGENT = 255
MAX_RACES = 2
"""Max attempts of a request that needs the password, if others change the hash after it was checked."""
RETRY_MS = 1_000
EXPORTS_PER_SECOND, EXPORTS_AT_ONCE = 1 / 60, 3
"""Max exports, per second and as a burst, per user and worker."""
REQUESTS_PER_SECOND, REQUESTS_AT_ONCE = 1.0, 30
"""Max requests that list or end sessions, change the password or leave, per second and as a burst. Per session and
worker.
"""


class Begun(NamedTuple):
    """A session that has begun, with its user and its token."""

    user: User
    token: str
    session: Beginning


class AccountRequest(NamedTuple):
    """A request of a user with a session."""

    request: Request
    active: Active
    body: bytes
    database: Database
    """The database for this request, with the connections that its kind of request has."""

    @property
    def user_id(self) -> UserId:
        """The user who sent the request."""
        return self.active.user.id


class Accounts:
    """Registration, login, logout, and the user's sessions."""

    def __init__(
        self,
        database: Database,
        events: Events,
        *,
        sessions: Sessions,
        attempts: Attempts,
        reads: SharedRateLimit,
        origins: frozenset[str],
        is_open: bool,
    ) -> None:
        """`reads` is the rate limit of reading frames. `is_open` is whether everybody may register."""
        self._database = database
        self._events = events
        self._sessions = sessions
        self._attempts = attempts
        self._reads = reads
        self._origins = origins
        self._is_open = is_open
        self._exports: TokenBuckets[UserId] = TokenBuckets(
            "exports of your user", EXPORTS_PER_SECOND, burst=EXPORTS_AT_ONCE
        )
        self._requests: TokenBuckets[SessionId] = TokenBuckets(
            "account requests of your session", REQUESTS_PER_SECOND, burst=REQUESTS_AT_ONCE
        )

    def routes(self) -> list[Route]:
        """Return the routes under /v1/auth."""
        return [
            Route("/v1/auth/register", endpoint(self.register), methods=["POST"]),
            Route("/v1/auth/login", endpoint(self.login), methods=["POST"]),
            self._of_session("POST", "/v1/auth/logout", self.logout),
            self._of_session("POST", "/v1/auth/password", self.change_password),
            self._of_session("POST", "/v1/auth/deactivate", self.deactivate),
            self._of_session("POST", "/v1/auth/delete", self.delete),
            Route("/v1/auth/export", endpoint(self.export), methods=["GET"]),
            self._of_session("GET", "/v1/auth/sessions", self.list_sessions),
            self._of_session("DELETE", "/v1/auth/sessions", self.revoke_all),
            self._of_session("DELETE", "/v1/auth/sessions/{session_id}", self.revoke),
        ]

    async def caller(self, request: Request) -> Active:
        """Return the session of a request. Raises Refused without a valid one."""
        token = token_of(request, self._origins)
        if token is None:
            raise Refused(
                ErrorCode.UNAUTHENTICATED, "The request has no token. Log in, and send it as `Authorization: Bearer`."
            )
        return await self._sessions.authenticate(token)

    async def session_and_body(self, request: Request) -> tuple[Active, bytes]:
        """Return the session and the body of a request. The session comes last, because it might end while the body
        arrives.
        """
        data = await limited_body(request)
        return await self.caller(request), data

    def _of_session(self, method: str, path: str, act: Callable[[AccountRequest], Awaitable[Response]]) -> Route:
        """Return a route about the user's sessions. Each request takes tokens of its session by its size. It has a
        connection that frames cannot hold, so no flood of frames from another session blocks it.
        """

        async def respond(request: Request) -> Response:
            active, body = await self.session_and_body(request)
            self._requests.require(active.session_id, 1 + len(body) // TOKEN_BYTES)
            database = self._database.of_sessions(active.user.id, active.session_id)
            with self._rechecking(active.user.id):
                return await act(AccountRequest(request, active, body, database))

        return Route(path, endpoint(respond), methods=[method])

    @contextmanager
    def _rechecking(self, user_id: UserId) -> Iterator[None]:
        """Make the workers recheck a user if the block fails and may have ended sessions."""
        try:
            yield
        except BaseException as error:
            if may_have_committed(error):
                self._events.recheck(user_id, None)
            raise

    async def register(self, request: Request) -> Response:
        """Create an account and begin its first session."""
        require_origin(request, self._origins)
        address = key_of(request)
        await self._attempts.of_address(address)
        if not self._is_open:
            raise Refused(
                ErrorCode.FORBIDDEN, "Registration is closed. Ask the operator of this server for an account."
            )
        body = decode(await limited_body(request), _register)
        password_hash = await passwords.hashed(body.password)

        async def made(db: Db) -> Begun | None:
            user_id = await accounts.register(db, body.name, canonical(body.email), password_hash)
            return await self._begin(db, request, User(id=user_id, name=body.name), password_hash)

        begun = await self._database.of_strangers(address).atomically("register", made)
        assert begun is not None  # noqa: S101 - the account was made in the same transaction
        return self._welcome(request, begun, status=201)

    async def login(self, request: Request) -> Response:
        """Begin a session."""
        require_origin(request, self._origins)
        await self._attempts.of_address(key_of(request))
        body = decode(await limited_body(request), _login)
        email = canonical(body.email)
        async with self._attempts.at_account(email):
            for _ in range(MAX_RACES):
                async with self._database.connection() as db:
                    found = await accounts.find(db, email)
                there = None if found is None else found.password_hash
                if not await passwords.matches(body.password, there) or found is None:
                    break
                if (begun := await self._log_in(request, found, body.password)) is not None:
                    return self._welcome(request, begun, status=200)
            raise Refused(
                ErrorCode.UNAUTHENTICATED, "The e-mail address and the password do not match. Correct one of them."
            )

    async def _log_in(self, request: Request, found: Found, password: str) -> Begun | None:
        """Begin a session after the password was checked, which also restores a deactivated or deleted account. Return
        None if the password or the account has changed since the check.
        """
        checked = found.password_hash
        new_hash = await passwords.hashed(password) if passwords.is_outdated(checked) else None

        async def made(db: Db) -> tuple[Begun | None, bool]:
            await users.lock(db, [found.user.id])
            is_back = await accounts.come_back(db, found.user.id, checked)
            begun = await self._begin(db, request, found.user, checked)
            if begun is not None and new_hash is not None:
                await accounts.set_password(db, found.user.id, new_hash, instead_of=checked)
            return begun, is_back

        with self._rechecking(found.user.id):
            begun, is_back = await self._database.of_sessions(found.user.id, None).atomically("login", made)
            if is_back:
                self._events.reconsider(found.user.id)
            if begun is not None and begun.session.has_ended_others:
                self._events.notify([found.user.id])
        return begun

    async def logout(self, account_request: AccountRequest) -> Response:
        """End the session of the request."""
        await self._revoke(account_request, account_request.active.session_id)
        response = Response(status_code=204)
        forget_cookie(account_request.request, response)
        return response

    async def change_password(self, account_request: AccountRequest) -> Response:
        """Change the password, and end all sessions except the one of the request."""
        user_id, body = account_request.user_id, decode(account_request.body, _change)

        async def change(checked: str | None) -> bool:
            new_hash = await passwords.hashed(body.new_password)

            async def changed(db: Db) -> bool:
                await users.lock(db, [user_id])
                is_changed = await accounts.change_password(
                    db, user_id, new_hash, instead_of=checked, session_id=account_request.active.session_id
                )
                if is_changed:
                    await users.touch(db, [user_id])
                return is_changed

            return await account_request.database.atomically("change a password", changed)

        await self._with_password(account_request, body.password, change)
        self._events.notify([user_id])
        return Response(status_code=204)

    async def deactivate(self, account_request: AccountRequest) -> Response:
        """Deactivate the account until the next login. Nobody finds the user or writes to them."""
        return await self._leave(account_request, is_for_good=False)

    async def delete(self, account_request: AccountRequest) -> Response:
        """Delete the account. The user is erased after the grace period, in which a login restores the account."""
        return await self._leave(account_request, is_for_good=True)

    async def _leave(self, account_request: AccountRequest, *, is_for_good: bool) -> Response:
        user_id, body = account_request.user_id, decode(account_request.body, _confirm)

        async def leave(checked: str | None) -> bool:
            async def left(db: Db) -> bool:
                await users.lock(db, [user_id])
                is_left = await accounts.leave(
                    db, user_id, checked, session_id=account_request.active.session_id, is_for_good=is_for_good
                )
                if is_left:
                    await sessions.revoke(db, user_id, None)
                return is_left

            return await account_request.database.atomically("leave", left)

        await self._with_password(account_request, body.password, leave)
        self._events.notify([user_id])
        self._events.reconsider(user_id)
        response = Response(status_code=204)
        forget_cookie(account_request.request, response)
        return response

    async def _with_password(
        self, account_request: AccountRequest, password: str, act: Callable[[str | None], Awaitable[bool]]
    ) -> None:
        """Call `act` for a user who has a session and knows the password. Raises Refused if the session has ended or
        the password is wrong. Only a wrong password counts as an attempt.

        `act` gets the hash of the check. It returns False, without an effect, if another request has changed the hash
        or the password.
        """
        for _ in range(MAX_RACES):
            async with account_request.database.connection() as db:
                address = await accounts.address(db, account_request.user_id)
            # Logins use the same key, so that an account has one counter.
            async with self._attempts.at_account(address or account_request.user_id.hex):
                async with account_request.database.connection() as db:
                    checked = await accounts.password_hash(db, account_request.user_id)
                if not await passwords.matches(password, checked):
                    raise not_the_password()
                if await act(checked):
                    return
            await self.caller(account_request.request)
        raise Refused(
            ErrorCode.UNAVAILABLE,
            "Another request is changing the account. Retry after `retry_after_ms`.",
            retry_after_ms=RETRY_MS,
        )

    async def export(self, request: Request) -> Response:
        """Return all stored data of the user. An export takes tokens and connections as frames do."""
        active, body = await self.session_and_body(request)
        user_id = active.user.id
        self._reads.require(user_id, 1 + len(body) // TOKEN_BYTES)
        self._exports.require(user_id)
        return StreamingResponse(
            self._exported(AccountRequest(request, active, body, self._database.of(user_id))),
            media_type=JSON,
            headers={
                "cache-control": "no-store",
                "content-disposition": f'attachment; filename="openchat-{user_id}.json"',
            },
        )

    async def _exported(self, account_request: AccountRequest) -> AsyncIterator[bytes]:
        """Yield a user's data in pieces. If the session ends, stop, so that the response is incomplete."""
        async for piece in written(account_request.database.connection, account_request.user_id):
            async with account_request.database.connection() as db:
                if not await sessions.living(db, [account_request.active.session_id]):
                    return
            yield piece

    async def list_sessions(self, account_request: AccountRequest) -> Response:
        """Return the user's sessions."""
        async with account_request.database.connection() as db:
            mine = await sessions.of_user(db, account_request.user_id, account_request.active.session_id)
        return json_response(SessionList(sessions=mine))

    async def revoke(self, account_request: AccountRequest) -> Response:
        """End one of the user's sessions."""
        try:
            session_id = msgspec.convert(account_request.request.path_params["session_id"], SessionId)
        except msgspec.ValidationError:
            raise NotFound("session_id") from None
        if not await self._revoke(account_request, session_id):
            raise NotFound("session_id")
        return Response(status_code=204)

    async def revoke_all(self, account_request: AccountRequest) -> Response:
        """End all of the user's sessions, including the one of the request."""
        await self._revoke(account_request, None)
        return Response(status_code=204)

    async def _revoke(self, account_request: AccountRequest, session_id: SessionId | None) -> bool:
        """End one session of the user, or all of them. Return whether there was any. Without any, take no lock."""
        user_id = account_request.user_id
        async with account_request.database.connection() as db:
            if not await sessions.is_there(db, user_id, session_id):
                return False

        async def revoked(db: Db) -> bool:
            await users.lock(db, [user_id])
            is_revoked = await sessions.revoke(db, user_id, session_id) > 0
            if is_revoked:
                await users.touch(db, [user_id])
            return is_revoked

        is_revoked = await account_request.database.atomically("revoke", revoked)
        if is_revoked:
            self._events.notify([user_id])
        return is_revoked

    async def _begin(self, db: Db, request: Request, user: User, checked: str) -> Begun | None:
        token = new_token()
        device = (address_of(request), request.headers.get("user-agent", "")[:MAX_USER_AGENT].replace("\0", "") or None)
        lasts = self._sessions.lasts
        begun = await sessions.create(db, user.id, token_hash(token), lasts, device, password_hash=checked)
        return None if begun is None else Begun(user, token, begun)

    def _welcome(self, request: Request, begun: Begun, *, status: int) -> Response:
        session = begun.session
        said = LoggedIn(
            token=begun.token, session_id=session.session_id, expires_at=session.expires_at, user=begun.user
        )
        response = json_response(said, status=status)
        set_cookie(request, response, begun.token)
        return response


def not_the_password() -> Refused:
    """Return the refusal for a wrong password."""
    return Refused(ErrorCode.FORBIDDEN, "The password is wrong. Correct it.", path="password")
