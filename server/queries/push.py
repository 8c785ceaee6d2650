"""Push notifications: endpoints, and the messages that are news for them."""

from collections.abc import Sequence
from typing import NamedTuple
from uuid import UUID

from protocol.client import RegisterPush
from protocol.ids import ConversationId, MessageId, SessionId, UserId
from protocol.limits import MAX_PUSH_ENDPOINTS
from protocol.values import User
from server.db.database import Db
from server.db.rows import Reader
from server.queries.unread import SILENCES
from server.queries.users import FACE

_user_decoder = Reader(User)

KEY = """
WITH made AS (INSERT INTO server_key (name, value) VALUES ($1, $2) ON CONFLICT DO NOTHING RETURNING value)
SELECT coalesce((SELECT value FROM made), (SELECT value FROM server_key WHERE name = $1))
"""


async def key(db: Db, name: str, otherwise: str) -> str:
    """Return a key of the server. If there is none, store `otherwise` as that key."""
    # The first statement may wait for a concurrent one, whose row it does not see. The second one sees it.
    return str(await db.fetchval(KEY, name, otherwise) or await db.fetchval(KEY, name, otherwise))


# An endpoint belongs to the user who registered it last, because a browser has one endpoint for all users. The oldest
# others of the user are deleted. One that is locked is being deleted or registered by another user.
REGISTER = f"""
WITH living AS (
    SELECT s.id FROM session s WHERE s.id = $2 AND s.user_id = $1 FOR KEY SHARE
), excess AS (
    DELETE FROM push_endpoint e USING living WHERE e.id IN (
        SELECT o.id FROM push_endpoint o WHERE o.id = ANY(ARRAY(
            SELECT n.id FROM push_endpoint n WHERE n.user_id = $1 AND n.endpoint <> $3
            ORDER BY n.created_at DESC OFFSET {MAX_PUSH_ENDPOINTS - 1}
        )) FOR UPDATE SKIP LOCKED
    )
)
INSERT INTO push_endpoint (user_id, session_id, endpoint, p256dh, auth, created_at)
SELECT $1, living.id, $3, $4, $5, clock_timestamp() FROM living
ON CONFLICT (endpoint) DO UPDATE SET user_id = excluded.user_id, session_id = excluded.session_id,
    p256dh = excluded.p256dh, auth = excluded.auth, created_at = excluded.created_at
RETURNING NOT EXISTS (SELECT FROM push_endpoint e WHERE e.user_id = $1 AND e.endpoint = $3)
"""  # noqa: S608 - a number is put in
UNREGISTER = "DELETE FROM push_endpoint WHERE user_id = $1 AND endpoint = $2"
FORGET = "DELETE FROM push_endpoint WHERE endpoint = $1 RETURNING user_id"


async def register(db: Db, frame: RegisterPush, user_id: UserId, session_id: SessionId) -> bool | None:
    """Store an endpoint, and delete the user's oldest ones beyond `MAX_PUSH_ENDPOINTS`. Return whether the endpoint is
    new for the user, or None if the session has ended.

    The caller has locked the user. Otherwise concurrent calls would not see each other's rows.
    """
    is_new: bool | None = await db.fetchval(REGISTER, user_id, session_id, frame.endpoint, frame.p256dh, frame.auth)
    return is_new


async def unregister(db: Db, user_id: UserId, endpoint: str) -> None:
    """Delete an endpoint of a user."""
    await db.execute(UNREGISTER, user_id, endpoint)


async def forget(db: Db, endpoint: str) -> UserId | None:
    """Delete an endpoint that no longer works. Return its user, or None if it does not exist."""
    user_id: UserId | None = await db.fetchval(FORGET, endpoint)
    return user_id


class PushPost(NamedTuple):
    """A message to push to an endpoint of a user. Posts may wait long, so they do not have the content."""

    user_id: UserId
    endpoint: str
    conversation_id: ConversationId
    message_id: MessageId


class Notice(NamedTuple):
    """The content of a post, and the keys to encrypt it."""

    post: PushPost
    p256dh: str
    auth: str
    sender: User
    title: str | None
    is_mention: bool
    thread_root_id: MessageId | None
    body: str


EXCERPT = 160
"""Max characters of a message in a notification."""
DUE_SECONDS = 2.0
"""Max time of the statement that finds recipients, in seconds."""
ANY = "SELECT EXISTS (SELECT FROM push_endpoint)"
# The definition of a message that is news for a recipient, in three parts: the recipient alone, the message, and its
# sender. The recipient has not muted the conversation and has no quiet hours now.
_RECIPIENT = """
JOIN conversation c ON c.id = p.conversation_id AND NOT c.is_deleted
JOIN "user" them ON them.id = p.user_id AND them.is_active AND NOT them.is_deleted
CROSS JOIN LATERAL (SELECT CASE WHEN them.quiet_from IS NOT NULL THEN time_of_day(them.time_zone) END AS at) clock
"""
_MAY_BE_TOLD = """p.status = 'active'
    AND NOT (p.is_muted AND (p.muted_until IS NULL OR p.muted_until > now()))
    AND NOT coalesce(CASE WHEN them.quiet_from <= them.quiet_until
        THEN clock.at >= them.quiet_from AND clock.at < them.quiet_until
        ELSE clock.at >= them.quiet_from OR clock.at < them.quiet_until END, false)"""
# The message is unread. If the recipient wants mentions only, it is a mention, or a reply in a followed thread. A reply
# that is visible in its thread only is for followers of the thread and for mentioned users.
_MESSAGE = """
LEFT JOIN thread_follow t ON t.root_id = m.thread_root_id AND t.user_id = p.user_id AND t.is_following
    AND (t.conversation_id = m.conversation_id) IS TRUE
CROSS JOIN LATERAL (
    SELECT p.user_id = ANY(m.mentions) OR 'everyone' = ANY(m.loud_mentions) OR p.role = ANY(m.loud_mentions)
            AS is_mention,
        m.thread_root_id IS NULL OR m.also_in_conversation AS is_in_conversation
) said
"""
_IS_NEWS = """NOT m.is_deleted AND NOT m.is_moderated AND NOT m.is_system_message
    AND p.user_id <> m.sender_id AND m.sent_version > visible_after(c, p)
    AND (p.notification_level = 'all' AND said.is_in_conversation
        OR p.notification_level <> 'none' AND (said.is_mention OR t.user_id IS NOT NULL))
    AND (said.is_in_conversation AND m.sent_version > coalesce(p.unread_from_version - 1, p.last_read_version)
        OR NOT said.is_in_conversation AND m.thread_order > coalesce(t.last_read_order, 0)
            AND m.sent_version > p.last_read_version)"""
# The recipient does not silence the sender. A notification contains the sender's name. If the sender has left, it is
# for recipients who may see the name. The planner may hash all rows of an EXISTS below OR, so these are scalars.
_SENDER_IS_SHOWN = f"""NOT {SILENCES.format(me="p.user_id", them="m.sender_id")}
    AND ((
        SELECT s.status = 'active' FROM conversation_participant s
        WHERE s.conversation_id = m.conversation_id AND s.user_id = m.sender_id
    ) IS TRUE OR may('see_face', p.user_id, m.sender_id))
    AND (
        SELECT true FROM user_relationship r
        WHERE r.from_user_id = p.user_id AND r.to_user_id = m.sender_id AND NOT r.notifications_enabled LIMIT 1
    ) IS NULL"""  # noqa: S608 - SILENCES is a constant
# Finds the participants who have endpoints, by a merge of two indexes in the order of user ids. Each step takes the
# next user with an endpoint, the candidate, and the next participant from that user on. The step after that begins at
# this participant. So there is at most one step per user with an endpoint, and at most two per participant. For each
# participant found, returns the latest message that is news. Silenced senders are checked per sender, not per message.
# A last row without an endpoint marks the end of a full page.
DUE = f"""
WITH RECURSIVE step AS (
    SELECT asked.conversation_id, asked.after AS candidate_id, asked.after AS participant_id, 0 AS place
    FROM unnest($1::uuid[], $2::uuid[]) AS asked (conversation_id, after)
    UNION ALL
    SELECT step.conversation_id, next.candidate_id, next.participant_id, step.place + 1
    FROM step CROSS JOIN LATERAL (
        SELECT e.user_id AS candidate_id, (
            SELECT p.user_id FROM conversation_participant p
            WHERE p.conversation_id = step.conversation_id AND p.user_id >= e.user_id ORDER BY p.user_id LIMIT 1
        ) AS participant_id
        FROM push_endpoint e WHERE e.user_id > step.candidate_id AND e.user_id >= step.participant_id
        ORDER BY e.user_id LIMIT 1
    ) next
    WHERE step.place < $4
), sent AS MATERIALIZED (
    SELECT m.* FROM unnest($3::uuid[]) AS due (id) JOIN message m ON m.id = due.id
)
SELECT reached.candidate_id, e.endpoint, reached.conversation_id, news.id
FROM (
    SELECT step.conversation_id, step.candidate_id FROM step
    WHERE step.place > 0 AND step.candidate_id = step.participant_id OFFSET 0
) reached
CROSS JOIN LATERAL (
    SELECT latest.id FROM conversation_participant p
    {_RECIPIENT}
    CROSS JOIN LATERAL (
        SELECT m.id FROM (
            SELECT DISTINCT ON (m.sender_id) m.id, m.conversation_id, m.sender_id, m.sent_version
            FROM sent m
            {_MESSAGE}
            WHERE m.conversation_id = p.conversation_id AND {_IS_NEWS}
            ORDER BY m.sender_id, m.sent_version DESC
        ) m
        WHERE {_SENDER_IS_SHOWN}
        ORDER BY m.sent_version DESC LIMIT 1
    ) latest
    WHERE p.conversation_id = reached.conversation_id AND p.user_id = reached.candidate_id AND {_MAY_BE_TOLD} OFFSET 0
) news
JOIN push_endpoint e ON e.user_id = reached.candidate_id
JOIN session s ON s.id = e.session_id AND s.expires_at > now()
UNION ALL
SELECT step.candidate_id, NULL, step.conversation_id, NULL FROM step
WHERE step.place = $4 AND step.participant_id IS NOT NULL
"""  # noqa: S608 - constants
NOTICES = f"""
SELECT due.user_id, due.endpoint, m.conversation_id, m.id, e.p256dh, e.auth, {FACE}, c.title, said.is_mention,
    m.thread_root_id, left(m.content, {EXCERPT})
FROM unnest($1::uuid[], $2::text[], $3::uuid[], $4::uuid[]) AS due (user_id, endpoint, conversation_id, message_id)
JOIN message m ON m.id = due.message_id AND (m.conversation_id = due.conversation_id) IS TRUE
JOIN "user" u ON u.id = m.sender_id
JOIN conversation_participant p ON p.conversation_id = due.conversation_id AND p.user_id = due.user_id
JOIN push_endpoint e ON e.user_id = due.user_id AND e.endpoint = due.endpoint
JOIN session s ON s.id = e.session_id AND s.expires_at > now()
{_RECIPIENT}
{_MESSAGE}
WHERE {_MAY_BE_TOLD} AND {_IS_NEWS} AND {_SENDER_IS_SHOWN}
"""  # noqa: S608 - constants


async def is_anybody_there(db: Db) -> bool:
    """Whether any user has registered an endpoint."""
    return bool(await db.fetchval(ANY))


class PushPage(NamedTuple):
    """A page of users with an endpoint, after a user id: the candidates. The messages of the conversation are checked
    for those who take part in it.
    """

    conversation_id: ConversationId
    after: UserId
    message_ids: tuple[MessageId, ...]


FIRST = UserId(UUID(int=0))
"""The first page begins after this id."""


class DuePushes(NamedTuple):
    """The posts for endpoints, one per conversation and endpoint, and the last candidate of each page that has a
    next one.
    """

    posts: list[PushPost]
    next: dict[ConversationId, UserId]


async def due(db: Db, pages: Sequence[PushPage], limit: int) -> DuePushes:
    """Return the endpoints for which messages are news, with the latest message of each conversation, for at most
    `limit` candidates per conversation. Raises TimeoutError after `DUE_SECONDS`.
    """
    ids = [message_id for page in pages for message_id in page.message_ids]
    found = DuePushes([], {})
    for user_id, endpoint, conversation_id, message_id in await db.fetch(
        DUE, [page.conversation_id for page in pages], [page.after for page in pages], ids, limit, timeout=DUE_SECONDS
    ):
        if endpoint is None:
            found.next[conversation_id] = user_id
        else:
            found.posts.append(PushPost(user_id, endpoint, conversation_id, message_id))
    return found


async def notices(db: Db, posts: Sequence[PushPost]) -> list[Notice]:
    """Return the content of posts, without those that are no longer news."""
    columns = [[post[number] for post in posts] for number in range(len(PushPost._fields))]
    found = []
    for user_id, endpoint, conversation_id, message_id, p256dh, auth, face, *said in await db.fetch(NOTICES, *columns):
        sender = _user_decoder.read(face)
        if sender is not None:
            found.append(Notice(PushPost(user_id, endpoint, conversation_id, message_id), p256dh, auth, sender, *said))
    return found
