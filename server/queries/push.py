"""Notifications: which endpoints there are, and for which of them a message is still news."""

from collections.abc import Sequence
from typing import NamedTuple

from protocol.client import RegisterPush
from protocol.ids import ConversationId, MessageId, SessionId, UserId
from protocol.limits import MAX_PUSH_ENDPOINTS
from protocol.values import User
from server.database import Db
from server.queries.unread import SILENCES
from server.queries.users import FACE
from server.rows import Reader

_user_decoder = Reader(User)

KEY = """
WITH made AS (INSERT INTO server_key (name, value) VALUES ($1, $2) ON CONFLICT DO NOTHING RETURNING value)
SELECT coalesce((SELECT value FROM made), (SELECT value FROM server_key WHERE name = $1))
"""


async def key(db: Db, name: str, otherwise: str) -> str:
    """Return a key of the server's; if there is none, that is `otherwise` from now on."""
    # The statement does not see what another one has made while it waited for that: the next one does.
    return str(await db.fetchval(KEY, name, otherwise) or await db.fetchval(KEY, name, otherwise))


# An endpoint belongs to whoever registered it last: a browser has one, whoever is logged in there.
REGISTER = """
INSERT INTO push_endpoint (user_id, session_id, endpoint, p256dh, auth)
SELECT $1, s.id, $3, $4, $5 FROM session s WHERE s.id = $2 AND s.user_id = $1
ON CONFLICT (endpoint) DO UPDATE SET user_id = excluded.user_id, session_id = excluded.session_id,
    p256dh = excluded.p256dh, auth = excluded.auth, created_at = now()
"""
KEEP = f"""
DELETE FROM push_endpoint e WHERE e.user_id = $1 AND e.id IN (
    SELECT o.id FROM push_endpoint o WHERE o.user_id = $1 ORDER BY o.created_at DESC OFFSET {MAX_PUSH_ENDPOINTS}
    FOR UPDATE SKIP LOCKED
)
"""  # noqa: S608 - a number is put in
UNREGISTER = "DELETE FROM push_endpoint WHERE user_id = $1 AND endpoint = $2"
FORGET = "DELETE FROM push_endpoint WHERE endpoint = $1 RETURNING user_id"


async def register(db: Db, frame: RegisterPush, user_id: UserId, session_id: SessionId) -> None:
    """Keep an endpoint, and of each user's the newest ones. Outside a transaction, so that no lock is held in between:
    of concurrent calls, the one whose second statement begins last sees the rows of all.
    """
    await db.execute(REGISTER, user_id, session_id, frame.endpoint, frame.p256dh, frame.auth)
    await db.execute(KEEP, user_id)


async def unregister(db: Db, user_id: UserId, endpoint: str) -> None:
    """Forget an endpoint of a user's."""
    await db.execute(UNREGISTER, user_id, endpoint)


async def forget(db: Db, endpoint: str) -> UserId | None:
    """Delete an endpoint that cannot be pushed to any more. Return whose it was, or None if there is none."""
    user_id: UserId | None = await db.fetchval(FORGET, endpoint)
    return user_id


class Post(NamedTuple):
    """Which message to push to which endpoint of which user. Posts may wait for long, so they hold no words."""

    user_id: UserId
    endpoint: str
    conversation_id: ConversationId
    message_id: MessageId


class Notice(NamedTuple):
    """What a post says, and the keys to encrypt it with."""

    post: Post
    p256dh: str
    auth: str
    sender: User
    title: str | None
    is_mention: bool
    thread_root_id: MessageId | None
    body: str


EXCERPT = 160
"""Max characters of a message in a notification."""
ANY = "SELECT EXISTS (SELECT FROM push_endpoint)"
# One definition of what is news: not read meanwhile, not of somebody or somewhere that is silenced, not in quiet hours;
# where only mentions are wanted, a mention, or a reply in a thread that is followed; and a reply that stands in its
# thread alone is for those who follow that, or are mentioned. A notification has the sender's name: if the sender has
# left meanwhile, it is for those who may see that name.
_NEWS = f"""
JOIN conversation c ON c.id = m.conversation_id AND NOT c.is_deleted
JOIN "user" u ON u.id = m.sender_id
JOIN conversation_participant p ON p.conversation_id = m.conversation_id AND p.status = 'active'
JOIN push_endpoint e ON e.user_id = p.user_id
JOIN session s ON s.id = e.session_id AND s.expires_at > now()
JOIN "user" them ON them.id = p.user_id AND them.is_active AND NOT them.is_deleted
LEFT JOIN thread_follow t ON t.root_id = m.thread_root_id AND t.user_id = p.user_id AND t.is_following
    AND (t.conversation_id = m.conversation_id) IS TRUE
CROSS JOIN LATERAL (
    SELECT p.user_id = ANY(m.mentions) OR 'everyone' = ANY(m.loud_mentions) OR p.role = ANY(m.loud_mentions)
            AS is_mention,
        CASE WHEN them.quiet_from IS NOT NULL THEN time_of_day(them.time_zone) END AS at,
        m.thread_root_id IS NULL OR m.also_in_conversation AS is_in_conversation
) said
WHERE NOT m.is_deleted AND NOT m.is_moderated AND NOT m.is_system_message
    AND p.user_id <> m.sender_id AND m.sent_version > visible_after(c, p)
    AND NOT (p.is_muted AND (p.muted_until IS NULL OR p.muted_until > now()))
    AND (p.notification_level = 'all' AND said.is_in_conversation
        OR p.notification_level <> 'none' AND (said.is_mention OR t.user_id IS NOT NULL))
    AND (said.is_in_conversation AND m.sent_version > coalesce(p.unread_from_version - 1, p.last_read_version)
        OR NOT said.is_in_conversation AND m.thread_order > coalesce(t.last_read_order, 0)
            AND m.sent_version > p.last_read_version)
    AND NOT {SILENCES.format(me="p.user_id", them="m.sender_id")}
    AND (EXISTS (
        SELECT FROM conversation_participant s
        WHERE s.conversation_id = m.conversation_id AND s.user_id = m.sender_id AND s.status = 'active'
    ) OR may('see_face', p.user_id, m.sender_id))
    AND NOT EXISTS (
        SELECT FROM user_relationship r
        WHERE r.from_user_id = p.user_id AND r.to_user_id = m.sender_id AND NOT r.notifications_enabled
    )
    AND NOT coalesce(CASE WHEN them.quiet_from <= them.quiet_until
        THEN said.at >= them.quiet_from AND said.at < them.quiet_until
        ELSE said.at >= them.quiet_from OR said.at < them.quiet_until END, false)
"""  # noqa: S608 - SILENCES is a constant
DUE = f"""
SELECT p.user_id, e.endpoint, m.conversation_id, m.id
FROM message m
{_NEWS} AND m.id = ANY($1)
ORDER BY m.created_at
"""  # noqa: S608 - a constant
NOTICES = f"""
SELECT due.user_id, due.endpoint, m.conversation_id, m.id, e.p256dh, e.auth, {FACE}, c.title, said.is_mention,
    m.thread_root_id, left(m.content, {EXCERPT})
FROM unnest($1::uuid[], $2::text[], $3::uuid[], $4::uuid[]) AS due (user_id, endpoint, conversation_id, message_id)
JOIN message m ON m.id = due.message_id AND (m.conversation_id = due.conversation_id) IS TRUE
{_NEWS} AND p.user_id = due.user_id AND e.endpoint = due.endpoint
"""  # noqa: S608 - constants


async def is_anybody_there(db: Db) -> bool:
    """Whether anybody wants notifications."""
    return bool(await db.fetchval(ANY))


async def due(db: Db, message_ids: Sequence[MessageId]) -> list[Post]:
    """Return for which endpoints these messages are news, the latest message last."""
    return [Post(*row) for row in await db.fetch(DUE, list(message_ids))]


async def notices(db: Db, posts: Sequence[Post]) -> list[Notice]:
    """Return what posts say, without those that are no longer news."""
    columns = [[post[number] for post in posts] for number in range(len(Post._fields))]
    found = []
    for user_id, endpoint, conversation_id, message_id, p256dh, auth, face, *said in await db.fetch(NOTICES, *columns):
        sender = _user_decoder.read(face)
        if sender is not None:
            found.append(Notice(Post(user_id, endpoint, conversation_id, message_id), p256dh, auth, sender, *said))
    return found
