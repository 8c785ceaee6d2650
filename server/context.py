"""The parameters of a handler: its caller, and the services that it may use. The two wings of the server meet here."""

from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, nullcontext
from datetime import datetime
from typing import Protocol

import msgspec

from protocol.client import SetPresence
from protocol.ids import ConversationId, SessionId, UserId
from protocol.server import (
    DurableEvent,
    MeChanged,
    OwnEvent,
    PresenceChanged,
    ServerFrame,
    StateEvent,
    TypingEvent,
    UserUpdated,
)
from protocol.values import Message, Presence, User
from server.core.errors import NotActive
from server.core.unconfirmed import Unconfirmed
from server.db.database import Database, Db
from server.db.lock_timeouts import FIRST_LOCK_MS
from server.fairness.batcher import Batcher
from server.fairness.lanes import Lanes
from server.fairness.shortcut import Shortcut
from server.queries import users
from server.queries.batched_changes import NotChanged
from server.queries.joins import Joined, JoinRequest
from server.queries.memberships import Membership
from server.queries.own_news import OwnNews
from server.queries.polls import Voted, VoteRequest
from server.queries.reactions import ReactionChange, ReactionRequest
from server.queries.sending import NotStored, Outgoing, Stored


class Events(Protocol):
    """Publishes events after a handler's commit. `Hub` implements it, which handlers may not import."""

    def publish(self, event: DurableEvent, *, gone: UserId | None = None) -> None:
        """Deliver a durable event in the order of versions. Then stop delivery to the user `gone`."""

    def relay(self, conversation_id: ConversationId, event: StateEvent | TypingEvent) -> None:
        """Deliver an ephemeral event to the connections that are attached now."""

    def whisper(self, user_id: UserId, event: StateEvent) -> None:
        """Deliver an ephemeral event to a user's own devices."""

    def tell_own(self, user_id: UserId, event: OwnEvent) -> None:
        """Deliver a change of a user's own rows to the user's devices, in the order of user versions. It must be the
        only event of its user version.
        """

    def send_to_watchers(self, user_id: UserId, event: PresenceChanged | UserUpdated) -> None:
        """Deliver an event about a user to those who watch the user."""

    def reconsider(self, user_id: UserId, watcher: UserId | None = None) -> None:
        """Check again whether those who watch a user may do so, or whether `watcher` may. They receive nothing until
        the check is done.
        """

    def notify(self, user_ids: Iterable[UserId], *, may_watch_others: bool = False) -> None:
        """Make the workers recheck these users' conversations and sessions. With `may_watch_others`, also recheck whom
        they may watch.
        """

    def recheck(self, user_id: UserId, conversation_id: ConversationId | None) -> None:
        """Make the workers recheck a user and a conversation some seconds later, because the outcome of a write is
        unknown.
        """

    def published_at(self, conversation_id: ConversationId, version: int) -> datetime | None:
        """Return when this worker delivered a version, if it still remembers."""


class Subscriber(Protocol):
    """The connection of a frame, as far as handlers may use it. `Connection` implements it, which handlers may not
    import.
    """

    user_version: int
    """The user version that the connection was last sent."""
    is_partly_resumed: bool
    """Whether the client will name further conversations, so that the others are sent to it later."""

    @property
    def attached(self) -> Collection[ConversationId]:
        """The conversations whose events the connection receives."""

    @property
    def is_closed(self) -> bool:
        """Whether no further frame reaches the client."""

    async def open(self, conversation_ids: Sequence[ConversationId]) -> None:
        """Make the worker follow these conversations, so that no later event of theirs is missed."""

    def attach(self, conversation_id: ConversationId, version: int) -> bool:
        """Deliver the events after `version`. Return False if later ones were delivered already. Then the caller must
        read those and try again.
        """

    def catching_up(self, conversation_id: ConversationId) -> AbstractContextManager[None]:
        """Keep events that are delivered during the block, for an `attach` at a version that is read in the block."""

    def detach(self, conversation_id: ConversationId) -> None:
        """Stop delivering events of a conversation."""

    def is_crowd(self, conversation_id: ConversationId) -> bool:
        """Whether the worker leaves out changes of a conversation, because it reaches very many users."""

    def say(self, *frames: ServerFrame) -> None:
        """Send frames to this connection alone, in one write. Frames from a handler take tokens as its reply does."""

    def charge(self, size: int) -> None:
        """Take tokens for `size` bytes that were read and are not sent, as if they were."""

    async def drained(self) -> None:
        """Wait until the client has received most of what was sent, so that the caller may produce more."""

    async def watch(self, user_ids: Collection[UserId]) -> Mapping[UserId, Presence]:
        """Deliver the presence and the names and images of these users. Return their presences, as far as the caller
        may see them. Raises Refused if the connection watches too many users.
        """

    def unwatch(self, user_ids: Iterable[UserId]) -> None:
        """Stop delivering the presence of these users."""


class UserNews(Protocol):
    """News for the connections of one user at a worker, which share one read. `PostgresUserNews` of `app` implements
    it.
    """

    @property
    def is_whole(self) -> bool:
        """Whether the user's memberships may have changed, too, and not only their own rows."""

    async def memberships(self) -> Mapping[ConversationId, Membership]:
        """Return the user's conversations, as of the first call or later."""

    async def news(self, since: int) -> OwnNews:
        """Return the first changes of the user's own rows after the user version `since`, as of the first such call."""


class Presences(Protocol):
    """The presence of users. `Presence` of `domain` implements it, which imports this file."""

    async def choose(self, context: "Context", frame: SetPresence) -> MeChanged | None:
        """Store the chosen presence of the caller, or of one of the caller's devices. Return the event for the caller's
        own devices, if the choice changed.
        """

    async def republish(self, user_id: UserId) -> None:
        """Send a user's presence again to those who watch the user, after a change of privacy."""


class AfterSend(Protocol):
    """Work that follows some time after a message is stored, such as a push."""

    def enqueue(self, message: Message) -> None:
        """Enqueue this message."""


class Tokens(Protocol):
    """A rate limit for each user's frames."""

    def require(self, user_id: UserId, count: int = 1, *, taken: int = 0, path: str | None = None) -> None:
        """Take `count` tokens, in addition to `taken` ones for the same frame. Raises Refused if there are too few.
        `path` names the field whose limit it is, if the limit is not that of all frames.
        """


class Services(msgspec.Struct, frozen=True, kw_only=True):
    """Services that all connections of a worker share."""

    database: Database
    events: Events
    presence: Presences
    sends: Shortcut[ConversationId, Outgoing, Stored | NotStored]
    reactions: Lanes[ConversationId, ReactionRequest, ReactionChange | NotChanged]
    votes: Lanes[ConversationId, VoteRequest, Voted | NotChanged]
    joins: Lanes[ConversationId, JoinRequest, Joined | NotChanged]
    memberships: Batcher[UserId, dict[ConversationId, Membership]]
    """Reads users' conversations. When many users reconnect concurrently, one query reads those of several."""
    unconfirmed: Unconfirmed
    web_push: AfterSend
    """Pushes a message to users who have not read it after some seconds."""
    previews: AfterSend
    """Fetches the preview of a message's link."""
    search_indexer: AfterSend
    """Adds the words of a message to the search index."""
    writes: Tokens
    """The write limit, for frames whose handler knows their cost."""
    new_endpoints: Tokens
    """The limit for new push endpoints."""
    push_key: str
    """The public VAPID key of Web Push, in base64url."""
    anyone_adds: bool
    """Whether everybody who may invite a user may also add the user without their consent (`OPENCHAT_ADD_PEOPLE`)."""


class Context(msgspec.Struct, frozen=True, kw_only=True):
    """The caller of a handler: a connection, or an HTTP call, which has no `subscriber`."""

    services: Services
    user: User
    session_id: SessionId
    subscriber: Subscriber | None = None
    is_of_job: bool = False
    """Whether a job acts for the caller. It does not wait for the caller's turn, and waits only briefly for locks."""
    lock_ms: int = FIRST_LOCK_MS
    """Max time that a transaction waits for a lock, in milliseconds."""
    place: Callable[[], AbstractAsyncContextManager[None]] = nullcontext
    """Waits for the place of each transaction among frames that need locked rows."""

    @property
    def user_id(self) -> UserId:
        """The caller's id."""
        return self.user.id

    @property
    def database(self) -> Database:
        """The database, with the caller's share of connections."""
        database = self.services.database
        return database if self.is_of_job else database.of(self.user_id, lock_ms=self.lock_ms)

    @asynccontextmanager
    async def transaction(self, *, checks_account: bool = True) -> AsyncIterator[Db]:
        """Borrow a connection inside a transaction, which commits when the block ends. If the caller's account is no
        longer active then, it rolls back and raises NotActive. The frame may have waited for long. Raises RowHeld if
        the transaction waits for a lock longer than `lock_ms`. Then dispatch repeats the frame.

        Without `checks_account`, the block locks the account, and raises NotActive itself.
        """
        async with self.place(), self.database.transaction() as db:
            yield db
            if checks_account and not await users.is_active(db, self.user_id):
                raise NotActive

    @asynccontextmanager
    async def statement(self) -> AsyncIterator[Db]:
        """Borrow a connection for one statement that locks rows, and that contains `BRIEFLY`. Raises RowHeld as
        `transaction` does.
        """
        async with self.place(), self.database.statement() as db:
            yield db

    @property
    def events(self) -> Events:
        """The publisher of events."""
        return self.services.events

    @property
    def connection(self) -> Subscriber:
        """The connection of a frame whose route is `socket_only`."""
        assert self.subscriber is not None  # noqa: S101 - dispatch refuses such frames by plain HTTP
        return self.subscriber
