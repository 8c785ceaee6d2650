"""The checks of `openchat check`. They recompute derived data from the rows, and search for rows that must not exist.

Each statement finds violations, and reads the database as of one moment. So nothing needs a lock. A concurrent change
is on both sides of a comparison or on neither.
"""

from collections.abc import Callable
from datetime import timedelta
from enum import Enum
from itertools import pairwise
from typing import NamedTuple
from uuid import UUID

from server.db.database import Db
from server.queries.relationships import BLANK


class Slices(Enum):
    """The parts of the database in which a check runs, one after the other. PostgreSQL cannot remove dead rows while a
    transaction lasts, and the whole of a large table takes long.
    """

    NONE = "none"
    CONVERSATIONS = "conversations"
    """Conversations by id, for checks that compare the rows of a conversation by an index."""
    PAGES = "pages"
    """Pages of the table of messages, for checks of single messages. One that moves meanwhile may be left out."""


class Check(NamedTuple):
    """A check. `FINDS` returns a row per violation. Its parameters are the bounds of a slice."""

    name: str
    FINDS: str
    by: Slices = Slices.NONE


Slice = tuple[object, ...]
"""The parameters of a check: the bounds of a slice."""
ROWS_IN_A_SLICE = 500_000
"""Max messages and participants in a slice of conversations, unless a single conversation has more."""
PAGES_IN_A_SLICE = 25_000
ENDS_OF_CONVERSATIONS = """
SELECT DISTINCT ON (slice) id FROM (
    SELECT id, sum(1 + message_count + participant_count) OVER (ORDER BY id) / $1::bigint AS slice FROM conversation
) c ORDER BY slice, id DESC
"""
NUMBER_OF_PAGES = "SELECT pg_relation_size('message') / current_setting('block_size')::bigint"
_OF_SLICE = "conversation_id > $1 AND conversation_id <= $2"
_ON_PAGES = "m.ctid >= $1 AND m.ctid < $2"


CHECKS = (
    Check("participant counts match the rows", f"""
        SELECT c.id FROM conversation c LEFT JOIN (
            SELECT conversation_id, count(*) AS n FROM conversation_participant
            WHERE status = 'active' AND {_OF_SLICE} GROUP BY 1
        ) p ON p.conversation_id = c.id
        WHERE c.participant_count <> coalesce(p.n, 0) AND c.id > $1 AND c.id <= $2
    """, by=Slices.CONVERSATIONS),  # noqa: S608 - a condition is put in
    Check("message counts match the rows", """
        SELECT c.id FROM conversation c LEFT JOIN (
            SELECT conversation_id, count(*) AS n FROM message WHERE NOT is_deleted GROUP BY 1
        ) m ON m.conversation_id = c.id
        WHERE c.message_count <> coalesce(m.n, 0)
    """),
    Check("reply counts match the rows", """
        SELECT m.id FROM message m LEFT JOIN (
            SELECT thread_root_id, count(*) AS n FROM message
            WHERE thread_root_id IS NOT NULL AND NOT is_deleted GROUP BY 1
        ) r ON r.thread_root_id = m.id
        WHERE m.reply_count <> coalesce(r.n, 0)
    """),
    Check("places in threads have no gaps", """
        SELECT r.thread_root_id FROM (
            SELECT thread_root_id, count(*) AS n, count(DISTINCT thread_order) AS places, min(thread_order) AS first,
                max(thread_order) AS last
            FROM message WHERE thread_root_id IS NOT NULL GROUP BY 1
        ) r JOIN message m ON m.id = r.thread_root_id
        WHERE r.first <> 1 OR r.last <> r.n OR r.places <> r.n OR m.thread_order <> r.n OR m.thread_root_id IS NOT NULL
    """),
    Check("reaction counts match the rows", """
        SELECT m.id FROM message m LEFT JOIN (
            SELECT message_id, jsonb_object_agg(emoji, n) AS counts FROM (
                SELECT message_id, emoji, count(*) AS n FROM message_reaction WHERE NOT is_removed GROUP BY 1, 2
            ) e GROUP BY 1
        ) r ON r.message_id = m.id
        WHERE m.reactions <> CASE WHEN m.is_deleted THEN '{}' ELSE coalesce(r.counts, '{}') END
    """),
    Check("vote counts match the rows", """
        SELECT m.id FROM message m WHERE m.poll_counts IS NOT NULL AND (
            m.poll_voters <> (SELECT count(*) FROM poll_vote v WHERE v.message_id = m.id AND v.options <> '{}')
            OR m.poll_counts <> ARRAY(
                SELECT (SELECT count(*) FROM poll_vote v WHERE v.message_id = m.id AND n - 1 = ANY(v.options))::integer
                FROM generate_subscripts(m.poll_counts, 1) n ORDER BY n))
        UNION ALL
        SELECT v.message_id FROM poll_vote v JOIN message m ON m.id = v.message_id
        WHERE v.options <> '{}' AND m.poll_counts IS NULL AND NOT m.is_deleted
    """),
    Check("versions of conversations match their rows", f"""
        SELECT c.id FROM conversation c
        LEFT JOIN (SELECT conversation_id, max(version) AS v FROM message WHERE {_OF_SLICE} GROUP BY 1) m
            ON m.conversation_id = c.id
        LEFT JOIN (SELECT conversation_id, max(version) AS v FROM message_reaction WHERE {_OF_SLICE} GROUP BY 1) r
            ON r.conversation_id = c.id
        LEFT JOIN (SELECT conversation_id, max(version) AS v FROM poll_vote WHERE {_OF_SLICE} GROUP BY 1) o
            ON o.conversation_id = c.id
        LEFT JOIN (
            SELECT conversation_id, max(version) AS v FROM conversation_participant WHERE {_OF_SLICE} GROUP BY 1
        ) p ON p.conversation_id = c.id
        WHERE (c.version <> greatest(c.settings_version, m.v, r.v, o.v, p.v) OR c.access_version > c.version)
            AND c.id > $1 AND c.id <= $2
    """, by=Slices.CONVERSATIONS),  # noqa: S608 - a condition is put in
    Check("no version occurs twice", f"""
        SELECT taken.conversation_id FROM (
            SELECT conversation_id, sent_version AS version FROM message WHERE {_OF_SLICE}
            UNION ALL SELECT conversation_id, version FROM conversation_participant WHERE version > 0 AND {_OF_SLICE}
            UNION ALL SELECT id, settings_version FROM conversation WHERE id > $1 AND id <= $2
        ) taken GROUP BY taken.conversation_id, taken.version HAVING count(*) > 1
    """, by=Slices.CONVERSATIONS),  # noqa: S608 - a condition is put in
    Check("no message changed before it was sent", f"""
        SELECT m.id FROM message m JOIN conversation c ON c.id = m.conversation_id
        WHERE (m.version < m.sent_version OR m.sent_version < 1 OR m.sent_version > c.version) AND {_ON_PAGES}
    """, by=Slices.PAGES),  # noqa: S608 - a condition is put in
    Check("no user version is behind its rows", """
        SELECT u.id FROM "user" u
        LEFT JOIN (SELECT user_id, max(user_version) AS v FROM conversation_participant GROUP BY 1) p
            ON p.user_id = u.id
        LEFT JOIN (SELECT user_id, max(user_version) AS v FROM message_star GROUP BY 1) s ON s.user_id = u.id
        LEFT JOIN (SELECT user_id, max(user_version) AS v FROM draft GROUP BY 1) d ON d.user_id = u.id
        LEFT JOIN (SELECT user_id, max(user_version) AS v FROM thread_follow GROUP BY 1) t ON t.user_id = u.id
        LEFT JOIN (SELECT sender_id, max(user_version) AS v FROM scheduled_message GROUP BY 1) w ON w.sender_id = u.id
        LEFT JOIN (SELECT from_user_id, max(from_version) AS v FROM user_relationship GROUP BY 1) f
            ON f.from_user_id = u.id
        WHERE u.version < greatest(u.own_version, p.v, s.v, d.v, t.v, w.v, f.v)
    """),
    Check("read and delivered positions match their messages", """
        SELECT p.id FROM conversation_participant p
        JOIN conversation c ON c.id = p.conversation_id
        LEFT JOIN message r ON r.id = p.last_read_message_id
        LEFT JOIN message d ON d.id = p.delivered_message_id
        LEFT JOIN message n ON n.id = p.unread_from_id
        WHERE p.conversation_id > $1 AND p.conversation_id <= $2 AND (r.conversation_id <> p.conversation_id
            OR r.sent_version > p.last_read_version
            OR d.conversation_id <> p.conversation_id OR d.sent_version <> p.delivered_version
            OR n.conversation_id <> p.conversation_id OR n.sent_version <> p.unread_from_version
            OR (p.unread_from_id IS NULL) <> (p.unread_from_version IS NULL)
            OR (p.last_read_message_id IS NOT NULL AND r.id IS NULL)
            OR greatest(p.last_read_version, p.delivered_version) > c.version)
    """, by=Slices.CONVERSATIONS),
    Check("all authors of replies have a row in the thread", """
        SELECT r.thread_root_id FROM (
            SELECT DISTINCT thread_root_id, sender_id FROM message WHERE thread_root_id IS NOT NULL
        ) r LEFT JOIN thread_follow t ON t.root_id = r.thread_root_id AND t.user_id = r.sender_id AND t.has_replied
        WHERE t.root_id IS NULL AND NOT EXISTS (
            SELECT FROM "user" u WHERE u.id = r.sender_id AND u.erased_at IS NOT NULL
        )
        UNION ALL
        SELECT t.root_id FROM thread_follow t JOIN message m ON m.id = t.root_id
        WHERE t.last_read_order > m.thread_order OR m.thread_root_id IS NOT NULL
    """),
    Check("rows about a message have its conversation", """
        SELECT r.message_id FROM message_reaction r JOIN message m ON m.id = r.message_id
        WHERE r.conversation_id <> m.conversation_id OR r.author_id <> m.sender_id
        UNION ALL SELECT e.message_id FROM message_edit e JOIN message m ON m.id = e.message_id
        WHERE e.conversation_id <> m.conversation_id
        UNION ALL SELECT v.message_id FROM poll_vote v JOIN message m ON m.id = v.message_id
        WHERE v.conversation_id <> m.conversation_id
        UNION ALL SELECT s.message_id FROM message_star s JOIN message m ON m.id = s.message_id
        WHERE s.conversation_id <> m.conversation_id
        UNION ALL SELECT t.root_id FROM thread_follow t JOIN message m ON m.id = t.root_id
        WHERE t.conversation_id <> m.conversation_id
        UNION ALL SELECT r.message_id FROM report r JOIN message m ON m.id = r.message_id
        WHERE r.conversation_id <> m.conversation_id
    """),
    Check("messages refer to their own conversation", f"""
        SELECT m.id FROM message m JOIN message o ON o.id = m.parent_message_id
        WHERE (o.conversation_id <> m.conversation_id OR m.thread_root_id <> coalesce(o.thread_root_id, o.id)
            OR m.thread_root_id IS NULL OR o.sent_version >= m.sent_version) AND {_ON_PAGES}
        UNION ALL SELECT m.id FROM message m JOIN message o ON o.id = m.quoted_message_id
        WHERE (o.conversation_id <> m.conversation_id OR o.sent_version >= m.sent_version) AND {_ON_PAGES}
        UNION ALL SELECT m.id FROM message m
        WHERE (m.forwarded_from_id IS NULL) <> (m.forwarded_sender_id IS NULL) AND {_ON_PAGES}
    """, by=Slices.PAGES),  # noqa: S608 - a condition is put in
    Check("mentioned users exist", f"""
        SELECT m.id FROM message m CROSS JOIN unnest(m.mentions) AS mentioned (id)
        LEFT JOIN "user" u ON u.id = mentioned.id WHERE m.mentions <> '{{}}' AND u.id IS NULL
            AND {_ON_PAGES}
    """, by=Slices.PAGES),  # noqa: S608 - a condition is put in
    Check("invitations to ended conversations are marked to end", """
        SELECT DISTINCT c.id FROM conversation_participant p JOIN conversation c ON c.id = p.conversation_id
        WHERE p.status = 'invited' AND (c.is_deleted OR NOT c.is_active) AND NOT c.has_remains
    """),
    Check("every group has one owner, or has ended", """
        SELECT c.id FROM conversation c LEFT JOIN (
            SELECT conversation_id, count(*) AS n FROM conversation_participant
            WHERE status = 'active' AND role = 'owner' GROUP BY 1
        ) o ON o.conversation_id = c.id
        WHERE c.type IN ('group', 'channel') AND NOT c.is_deleted AND coalesce(o.n, 0) <> c.is_active::integer
    """),
    Check("direct conversations have their two participants only", """
        SELECT c.id FROM conversation c LEFT JOIN conversation_participant p ON p.conversation_id = c.id
        WHERE c.type = 'direct' GROUP BY c.id
        HAVING count(*) <> 2 OR bool_or(p.user_id NOT IN (c.direct_low, c.direct_high)) IS NOT false
    """),
    Check("friendships are mutual, and no friend is blocked", """
        SELECT r.id FROM user_relationship r LEFT JOIN user_relationship o
            ON o.from_user_id = r.to_user_id AND o.to_user_id = r.from_user_id AND o.type = 'friend'
        WHERE r.type = 'friend' AND r.status = 'accepted' AND o.status IS DISTINCT FROM 'accepted'
        UNION ALL SELECT r.id FROM user_relationship r JOIN user_relationship b
            ON b.type = 'block' AND b.status = 'active' AND ((b.from_user_id = r.from_user_id
                AND b.to_user_id = r.to_user_id) OR (b.from_user_id = r.to_user_id AND b.to_user_id = r.from_user_id))
        WHERE r.type = 'friend' AND r.status = 'accepted'
    """),
    Check("deleted messages are empty", f"""
        SELECT m.id FROM message m WHERE {_ON_PAGES} AND m.is_deleted AND (
            m.content <> '' OR m.formatted_content IS NOT NULL OR m.payload IS NOT NULL OR m.metadata IS NOT NULL
            OR m.mentions <> '{{}}' OR m.hashtags <> '{{}}' OR m.reactions <> '{{}}' OR m.is_pinned
            OR m.link_preview IS NOT NULL OR m.deleted_at IS NULL)
    """, by=Slices.PAGES),  # noqa: S608 - a condition is put in
    Check("expired messages are deleted", """
        SELECT m.id FROM message m WHERE m.expires_at < now() - interval '5 minutes'
    """),
    Check("the search index has exactly the readable messages", f"""
        SELECT m.id FROM message m LEFT JOIN message_search s ON s.message_id = m.id
        WHERE {_ON_PAGES} AND (
            (s.message_id IS NOT NULL) <> (NOT m.is_deleted AND NOT m.is_moderated AND NOT m.is_system_message)
                AND (s.message_id IS NOT NULL OR m.id NOT IN (SELECT unnest(q.message_ids) FROM search_queue q))
            OR s.conversation_id <> m.conversation_id)
    """, by=Slices.PAGES),  # noqa: S608 - a condition is put in
    Check("the search index has no messages that do not exist", """
        SELECT s.message_id FROM message_search s WHERE NOT EXISTS (SELECT FROM message m WHERE m.id = s.message_id)
    """),
    Check("the search index matches the messages (one in a hundred)", """
        SELECT m.id FROM message m TABLESAMPLE system (1) JOIN message_search s ON s.message_id = m.id
        WHERE s.words IS DISTINCT FROM search_words(m.conversation_id, m.content, m.payload, m.mentions,
            m.loud_mentions, m.hashtags) AND NOT m.is_deleted AND NOT m.is_moderated
            AND m.id NOT IN (SELECT unnest(q.message_ids) FROM search_queue q)
    """),
    Check("ended conversations have no participants", """
        SELECT p.id FROM conversation_participant p JOIN conversation c ON c.id = p.conversation_id
        WHERE p.status = 'active' AND NOT c.is_active AND NOT c.is_deleted
    """),
    Check("disabled and erased users cannot log in", """
        SELECT s.id FROM session s JOIN "user" u ON u.id = s.user_id
        WHERE u.is_disabled OR u.erased_at IS NOT NULL
        UNION ALL SELECT a.id FROM account a JOIN "user" u ON u.id = a.user_id WHERE u.erased_at IS NOT NULL
        UNION ALL SELECT e.id FROM push_endpoint e JOIN session s ON s.id = e.session_id WHERE s.user_id <> e.user_id
    """),
    Check("deleted accounts are erased a day after their grace period", """
        SELECT id FROM "user" WHERE is_deleted AND erased_at IS NULL
            AND deleted_at < now() - current_setting('openchat.erase_after')::interval - interval '1 day'
    """),
    Check("erased users have no data left", """
        SELECT left_over.user_id FROM (
            SELECT user_id FROM conversation_participant WHERE status IN ('active', 'invited')
            UNION ALL SELECT user_id FROM session
            UNION ALL SELECT user_id FROM account
            UNION ALL SELECT r.from_user_id FROM user_relationship r WHERE NOT """ + BLANK + """
            UNION ALL SELECT r.to_user_id FROM user_relationship r WHERE NOT """ + BLANK + """
            UNION ALL SELECT user_id FROM draft
            UNION ALL SELECT sender_id FROM scheduled_message
            UNION ALL SELECT user_id FROM message_star
            UNION ALL SELECT user_id FROM push_endpoint
            UNION ALL SELECT user_id FROM thread_follow WHERE is_following
        ) left_over JOIN "user" u ON u.id = left_over.user_id WHERE u.erased_at IS NOT NULL
        UNION ALL SELECT u.id FROM "user" u WHERE u.erased_at IS NOT NULL AND (
            u.name <> 'Deleted user' OR u.email NOT LIKE 'erased-%@invalid' OR u.is_active OR NOT u.is_deleted
            OR u.is_admin
            OR coalesce(u.image, u.display_name, u.bio, u.location, u.website, u.custom_status) IS NOT NULL
        )
    """),  # noqa: S608 - a condition is put in
    Check("the audit logs are intact", """
        SELECT e.chain FROM (
            SELECT e.chain, e.number, coalesce(c.audit_number, 0) + row_number() OVER w AS place,
                e.hash = audit_hash(e) AS is_itself,
                e.previous_hash = coalesce(lag(e.hash) OVER w, c.audit_hash, '') AS is_next
            FROM audit_entry e LEFT JOIN conversation c ON c.id = e.chain
            WINDOW w AS (PARTITION BY e.chain ORDER BY e.number)
        ) e WHERE NOT e.is_itself OR NOT e.is_next OR e.number <> e.place
    """),
    # Only with readers. The superuser's function keep_no_statistics() deletes earlier statistics, as schema.sql
    # explains.
    Check("only owners can create tables", """
        SELECT a.privilege_type || ' on the database' FROM pg_database d,
            aclexplode(coalesce(d.datacl, acldefault('d', d.datdba))) a
        WHERE d.datname = current_database() AND a.grantee = 0 AND a.privilege_type IN ('TEMPORARY', 'CREATE')
        UNION ALL
        SELECT 'CREATE on the schema public' FROM pg_namespace n,
            aclexplode(coalesce(n.nspacl, acldefault('n', n.nspowner))) a
        WHERE n.nspname = 'public' AND a.grantee = 0 AND a.privilege_type = 'CREATE'
    """),
    Check("no statistics reveal hidden data to readers of the database", """
        SELECT s.tablename || '.' || s.attname FROM pg_stats s
        JOIN pg_class c ON c.relname = s.tablename AND c.relnamespace = 'public'::regnamespace
        LEFT JOIN pg_index i ON i.indexrelid = c.oid
        WHERE s.schemaname = 'public'
            AND EXISTS (SELECT FROM pg_policy p WHERE p.polrelid = coalesce(i.indrelid, c.oid))
            AND EXISTS (
                SELECT FROM pg_class v CROSS JOIN aclexplode(v.relacl) a
                WHERE v.oid = 'user_profile'::regclass AND a.grantee <> v.relowner
            )
    """),
    # Only with readers. `REVOKE CONNECT ON DATABASE … FROM PUBLIC` closes a database.
    Check("no reader can lock this database from another one", """
        SELECT o.name FROM open_databases() o (name)
        WHERE EXISTS (
            SELECT FROM pg_class v CROSS JOIN aclexplode(v.relacl) a
            WHERE v.oid = 'user_profile'::regclass AND a.grantee <> v.relowner
        )
    """),
)  # fmt: skip
"""All checks, in the order in which they run. The index of places itself prevents duplicate places."""

# Other connections of this program have limits and go from row to row. Here, whole tables are compared.
PREPARE = (
    "SET TRANSACTION READ ONLY",
    "SET LOCAL statement_timeout = 0",
    "SET LOCAL work_mem = '256MB'",
    "SET LOCAL hash_mem_multiplier = 4",
)
# A slice of pages looks up other rows one by one. A hash would contain a whole table, for each slice.
BY_PAGES = ("SET LOCAL enable_hashjoin = off", "SET LOCAL enable_mergejoin = off")
ERASE_AFTER = "SELECT set_config('openchat.erase_after', $1, true)"
GRACE = timedelta(days=30)
FOUND_SHOWN = 3
MESSAGES_IN_A_ROW = 20
"""Messages before each chosen version that are compared."""


class Violations(NamedTuple):
    """The number of violations, and some examples."""

    number: int
    some: list[str]

    def with_more(self, more: "Violations") -> "Violations":
        """Return these violations and those of a further slice."""
        return Violations(self.number + more.number, [*self.some, *more.some][:FOUND_SHOWN])


async def slices(db: Db, *, rows: int = ROWS_IN_A_SLICE, pages: int = PAGES_IN_A_SLICE) -> dict[Slices, list[Slice]]:
    """Return the slices of the database. Together they contain everything."""
    ids = [row[0] for row in await db.fetch(ENDS_OF_CONVERSATIONS, rows)]
    blocks = [(number, 0) for number in range(0, await db.fetchval(NUMBER_OF_PAGES) + 1, pages)]
    return {
        Slices.NONE: [()],
        Slices.CONVERSATIONS: list(pairwise([UUID(int=0), *ids[:-1], UUID(int=2**128 - 1)])),
        Slices.PAGES: list(pairwise([*blocks, (2**32 - 1, 0)])),
    }


async def run(db: Db, check: Check, of: Slice, *, grace: timedelta = GRACE) -> Violations:
    """Run a check of a slice. `grace` is the period in which users may restore a deleted account."""
    async with db.transaction():
        for STATEMENT in PREPARE + (BY_PAGES if check.by is Slices.PAGES else ()):  # noqa: N806 - as all SQL
            await db.execute(STATEMENT)
        await db.execute(ERASE_AFTER, f"{grace.total_seconds():.0f} seconds")
        rows = await db.fetch(check.FINDS, *of)
    return Violations(len(rows), [str(row[0]) for row in rows[:FOUND_SHOWN]])


async def run_all(db: Db, check: Check) -> Violations:
    """Run a check of all slices."""
    found = Violations(0, [])
    for one in (await slices(db))[check.by]:
        found = found.with_more(await run(db, check, one))
    return found


# A temporary role, which sees by the policies what another client of the database would see.
MAY_MAKE_ROLES = "SELECT rolcreaterole OR rolsuper FROM pg_roles WHERE rolname = current_user"
AS_READER = (
    "CREATE ROLE openchat_check NOLOGIN",
    "SELECT grant_reader('openchat_check')",
    "GRANT openchat_check TO CURRENT_USER",
)
SOMEBODY = """
WITH chosen AS MATERIALIZED (
    SELECT u.id AS user_id, c.id AS conversation_id
    FROM (SELECT id FROM "user" ORDER BY random() LIMIT $1) u
    CROSS JOIN (SELECT id FROM conversation ORDER BY random() LIMIT $1) c
    ORDER BY random() LIMIT $1
), there AS MATERIALIZED (
    SELECT user_id, conversation_id FROM conversation_participant ORDER BY random() LIMIT $1
)
SELECT user_id, conversation_id FROM chosen UNION SELECT user_id, conversation_id FROM there
"""
# Messages of a conversation: the newest, those around the user's last join, and those after random versions. Each with
# whether the rules show it to the user.
EXPECTED = """
SELECT m.id, p.user_id IS NOT NULL AND NOT c.is_deleted
    AND (coalesce(c.settings ->> 'history', '') <> 'from_joining' OR m.sent_version > p.joined_version)
    AND (NOT m.is_moderated OR m.sender_id = $1 OR p.role IN ('moderator', 'admin', 'owner') OR p.can_delete_messages)
FROM conversation c
LEFT JOIN conversation_participant p ON p.conversation_id = c.id AND p.user_id = $1 AND p.status = 'active'
CROSS JOIN LATERAL (
    SELECT c.version AS version
    UNION SELECT p.joined_version + $3 / 2
    UNION SELECT (c.version * random())::bigint FROM generate_series(1, 8)
) at
CROSS JOIN LATERAL (
    SELECT m.* FROM message m WHERE m.conversation_id = c.id AND m.sent_version <= at.version
    ORDER BY m.sent_version DESC LIMIT $3
) m
WHERE c.id = $2
"""
SEEN = "SELECT id FROM message WHERE id = ANY($1)"
BECOME = "SELECT set_config('openchat.user_id', $1, true), set_config('role', 'openchat_check', true)"
BE_ONESELF = "SELECT set_config('role', 'none', true)"


async def may_make_roles(db: Db) -> bool:
    """Whether this connection may create the role that `leaks` needs."""
    return bool(await db.fetchval(MAY_MAKE_ROLES))


async def leaks(db: Db, *, many: int, counts: Callable[[int], None]) -> Violations:
    """Compare the messages that the policies show with those of the rules, for a random sample of users, conversations
    and messages. Return the differences. `counts` is called with the number of compared messages. The transaction is
    rolled back.
    """
    found, count = [], 0
    transaction = db.transaction()
    await transaction.start()
    try:
        for STATEMENT in AS_READER:  # noqa: N806 - a constant
            await db.execute(STATEMENT)
        for user_id, conversation_id in await db.fetch(SOMEBODY, many):
            compared = await db.fetch(EXPECTED, user_id, conversation_id, MESSAGES_IN_A_ROW)
            await db.execute(BECOME, str(user_id))
            seen = {row[0] for row in await db.fetch(SEEN, [message_id for message_id, _ in compared])}
            await db.execute(BE_ONESELF)
            if seen != {message_id for message_id, is_expected in compared if is_expected}:
                found.append(f"{user_id} in {conversation_id}")
            counts(count := count + len(compared))
    finally:
        await transaction.rollback()
    return Violations(len(found), found[:FOUND_SHOWN])
