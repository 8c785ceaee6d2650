"""What a handler receives: who asks, and what it may use to answer. The two wings of the server meet here."""

from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from datetime import datetime
from typing import Protocol

import msgspec

from protocol.client import SetPresence
from protocol.ids import ConversationId, SessionId, UserId
from protocol.server import DurableEvent, ServerFrame
from protocol.values import Message, Presence, User
from server.core.errors import NotActive
from server.core.unconfirmed import Unconfirmed
from server.db.database import Database, Db
from server.fairness.batcher import Batcher
from server.fairness.lanes import Lanes
from server.queries import users
from server.queries.conversations import Membership
from server.queries.sending import Outgoing, Stored
from server.queries.users import OwnNews


class Events(Protocol):
    """How a handler publishes events, after its commit: by the `Hub`, which handlers may not import."""

    def publish(self, event: DurableEvent, *, gone: UserId | None = None) -> None:
        """Deliver a durable event in the order of versions; then stop delivering to the user who is `gone`."""

    def relay(self, conversation_id: ConversationId, event: ServerFrame) -> None:
        """Deliver something ephemeral to whoever is there now."""

    def whisper(self, user_id: UserId, event: ServerFrame) -> None:
        """Deliver something ephemeral to a user's own devices."""

    def announce(self, user_id: UserId, event: ServerFrame) -> None:
        """Deliver something about a user to those who watch them."""

    def reconsider(self, user_id: UserId, watcher: UserId | None = None) -> None:
        """Check again whether all who watch a user may do so, or one of them. They get nothing until that is done."""

    def notify(self, user_ids: Iterable[UserId], *, may_watch_others: bool = False) -> None:
        """Have the workers look again at these users' conversations and sessions, and with `may_watch_others` check
        whom they may watch.
        """

    def published_at(self, conversation_id: ConversationId, version: int) -> datetime | None:
        """Return when a version was delivered by this worker, as far as it remembers."""


class Subscriber(Protocol):
    """The `Connection` that a frame came by, as far as handlers may use it: they may not import it."""

    user_version: int
    """The user's own clock, as far as the connection was told of it."""

    @property
    def attached(self) -> Collection[ConversationId]:
        """The conversations whose events reach the connection."""

    @property
    def is_closed(self) -> bool:
        """Whether nothing that is said reaches the client any more."""

    async def open(self, conversation_ids: Sequence[ConversationId]) -> None:
        """Have the worker follow these conversations: from now on nothing of them is missed."""

    def attach(self, conversation_id: ConversationId, version: int) -> bool:
        """Deliver the events after `version`; False if later ones were delivered already: read what came, try again."""

    def catching_up(self, conversation_id: ConversationId) -> AbstractContextManager[None]:
        """Keep what is delivered meanwhile, for an `attach` at what is read meanwhile."""

    def detach(self, conversation_id: ConversationId) -> None:
        """Deliver no more of them."""

    def say(self, *frames: ServerFrame) -> None:
        """Send frames to this connection alone, in one write. Those of a handler take tokens as its answer does."""

    def charge(self, size: int) -> None:
        """Have the frame take tokens as if so many bytes were said: they were read, and are not said."""

    async def drained(self) -> None:
        """Return when most of what was said has been taken in: before more of it is made."""

    async def watch(self, user_ids: Collection[UserId]) -> Mapping[UserId, Presence]:
        """Deliver the presence and the faces of these users; return how they are seen, as far as the caller may see
        them. Raises Refused when it would be too many.
        """

    def unwatch(self, user_ids: Iterable[UserId]) -> None:
        """Deliver it no more."""


class UserNews(Protocol):
    """What connections of one user are told: read once for all of those at a worker, by `PostgresUserNews` of `app`."""

    @property
    def is_whole(self) -> bool:
        """Whether the user's memberships may have changed, and not only rows of their own."""

    async def memberships(self) -> Mapping[ConversationId, Membership]:
        """Return the user's conversations, as of the first call or later."""

    async def news(self, since: int) -> OwnNews:
        """Return the first changes of the user's own after a number of their clock, as of the first such call."""


class Presences(Protocol):
    """Who is here, and how they are seen: `Presence` of `domain`, which imports this file."""

    async def choose(self, user_id: UserId, device: Subscriber | None, frame: SetPresence) -> bool:
        """Record how a user, or one device of theirs, wants to be seen; return whether they chose anew."""

    async def announce(self, user_id: UserId) -> None:
        """Tell those who watch a user how they are seen now."""


class AfterSend(Protocol):
    """What is done about a message some time after it was stored, if anything is."""

    def enqueue(self, message: Message) -> None:
        """Have it done for this one."""


class Tokens(Protocol):
    """An allowance of each user's frames."""

    def require(self, user_id: UserId, count: int = 1, *, taken: int = 0, path: str | None = None) -> None:
        """Take tokens, beside those that were taken for the same frame. Raises Refused if there are too few; `path`
        says what alone has to wait, if that is not the user.
        """


class Services(msgspec.Struct, frozen=True, kw_only=True):
    """What all connections of a worker share."""

    database: Database
    events: Events
    presence: Presences
    sends: Lanes[ConversationId, Outgoing, Stored | None]
    memberships: Batcher[UserId, dict[ConversationId, Membership]]
    """A user's conversations: when many come back at once, many users' in one query."""
    unconfirmed: Unconfirmed
    web_push: AfterSend
    """Pushes a message to those who have not read it after a while."""
    previews: AfterSend
    """Looks at the page that a message links to."""
    writes: Tokens
    """For a frame of which only its handler knows what it costs."""
    new_endpoints: Tokens
    """For push endpoints that a user did not have."""
    push_key: str
    """The public key of what is pushed, in base64url."""
    anyone_adds: bool
    """Whether everybody who may invite somebody may add them without asking (`OPENCHAT_ADD_PEOPLE`)."""


class Context(msgspec.Struct, frozen=True, kw_only=True):
    """One caller: a connection, or one HTTP call, which has no `subscriber`."""

    services: Services
    user: User
    session_id: SessionId
    subscriber: Subscriber | None = None
    is_of_job: bool = False
    """Whether a job acts for the caller: it waits for no turn of the caller's, and not for long for a lock."""

    @property
    def user_id(self) -> UserId:
        """Who is calling."""
        return self.user.id

    @property
    def database(self) -> Database:
        """The database, as the caller has it."""
        database = self.services.database
        return database.of_jobs() if self.is_of_job else database.of(self.user_id)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Db]:
        """Borrow a connection inside a transaction, which commits when the block ends. Raises NotActive then, and rolls
        it back, if the caller's account is not active any more: the frame may have waited for long.
        """
        async with self.database.transaction() as db:
            yield db
            if not await users.is_active(db, self.user_id):
                raise NotActive

    @property
    def events(self) -> Events:
        """Where to tell what happened."""
        return self.services.events

    @property
    def connection(self) -> Subscriber:
        """The connection that a frame of a route with `socket_only` came by."""
        assert self.subscriber is not None  # noqa: S101 - dispatch refuses such frames by plain HTTP
        return self.subscriber
