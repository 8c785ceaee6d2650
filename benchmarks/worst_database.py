"""A worst-case database, with one account at all of its limits, and an ordinary account."""

from typing import NamedTuple
from uuid import UUID

import asyncpg

from protocol.ids import ConversationId, MessageId, UserId
from protocol.limits import MAX_PAGE, MAX_PINS, MAX_RESUMED, MAX_SCHEDULED

BUSY = 1_000
"""Number of strangers with as many memberships as the account at its limits."""
CROWD = 50_000
"""Number of participants of the large conversation, at any size of the rest."""
WORDS = "engine loom weave brass steel punch cards gear wheel crank"


def _id(kind: int, number: int) -> UUID:
    # All conversations need different hashes (docs/decisions/0050-ids-that-collide.md). These ids have
    # them, up to 2**23 per kind.
    return UUID(int=kind << 84 | number)


MALLORY, BOB = UserId(_id(1, 0)), UserId(_id(1, 1))


class Objects(NamedTuple):
    """The objects that the frames of an account refer to."""

    me: UserId
    conversation: ConversationId
    root: MessageId
    """A message of the account, with a thread, reactions and edits."""
    poll: MessageId
    others: list[UserId]
    busy: list[UserId]
    """Strangers with as many memberships as the account at its limits."""
    members: list[UserId]
    """Members of the conversation, of whom each frame takes another one."""
    middle: UserId
    """A participant in the middle of the list."""
    conversations: list[ConversationId]


class Ids(NamedTuple):
    """The objects of both accounts."""

    of_mallory: Objects
    of_bob: Objects


HELPERS = """
CREATE FUNCTION pg_temp.id(kind bigint, n bigint) RETURNS uuid LANGUAGE sql IMMUTABLE RETURN
    (lpad(to_hex(kind << 20), 16, '0') || lpad(to_hex(n), 16, '0'))::uuid;
SET session_replication_role = replica;
"""
# Kinds of ids of users: 1, and 11 for busy strangers. Of conversations: 2 Mallory's, 7 public ones, 8 Bob's.
# Of messages: 3 in small conversations, 4 in the large one, 5 roots of threads, 6 replies. Others: 9 edits, 10
# scheduled messages.
STATEMENTS = (
    """INSERT INTO "user" (id, name, email, is_private, version)
    SELECT pg_temp.id(1, n), 'Ada Lovelace ' || n, 'ada' || n || '@example.org', n > 1, 20000
    FROM generate_series(0, {people}) n""",
    # Mallory's conversations. The first one is the large one.
    """INSERT INTO conversation (id, type, title, created_by, version, participant_count, message_count,
        settings_version, last_activity_at)
    SELECT pg_temp.id(2, n), 'group', 'Engine ' || n, pg_temp.id(1, 0), 1000000, CASE n WHEN 0 THEN {crowd} ELSE 2 END,
        100, 1, now() - n * interval '1 s'
    FROM generate_series(0, {conversations} - 1) n""",
    """INSERT INTO conversation (id, type, title, created_by, version, participant_count, is_public)
    SELECT pg_temp.id(7, n), 'channel', 'Engine room ' || n, pg_temp.id(1, 0), 1, n % 1000, true
    FROM generate_series(1, {people} / 2) n""",
    """INSERT INTO conversation_participant (conversation_id, user_id, role, version, user_version)
    SELECT pg_temp.id(2, n), pg_temp.id(1, who), 'owner', 2, 1
    FROM generate_series(0, {conversations} - 1) n CROSS JOIN LATERAL (VALUES (0), (2 + n % 1000)) w (who)""",
    """INSERT INTO conversation_participant (conversation_id, user_id, role, version)
    SELECT pg_temp.id(2, 0), pg_temp.id(1, n), 'member', n FROM generate_series(3, {crowd}) n""",
    """INSERT INTO conversation_participant (conversation_id, user_id, role, version, joined_at, invited_by, status)
    SELECT pg_temp.id(7, n), pg_temp.id(1, 0), 'member', 2, now(), pg_temp.id(1, 7), 'invited'
    FROM generate_series(1, {conversations}) n""",
    # Users whose names Mallory searches for. They are in as many conversations as she is, but in none of hers.
    """INSERT INTO "user" (id, name, email, is_private, version)
    SELECT pg_temp.id(11, n), 'Charles Babbage ' || n, 'charles' || n || '@example.org', true, 1
    FROM generate_series(1, {busy}) n""",
    """INSERT INTO conversation_participant (conversation_id, user_id, role, version)
    SELECT pg_temp.id(7, {conversations} + k), pg_temp.id(11, n), 'member', 2
    FROM generate_series(1, {busy}) n, generate_series(1, {conversations}) k""",
    # Bob has 20 conversations with 10 messages each.
    """INSERT INTO conversation (id, type, title, created_by, version, participant_count, message_count,
        settings_version)
    SELECT pg_temp.id(8, n), 'group', 'Bob ' || n, pg_temp.id(1, 1), 20, 2, 10, 1 FROM generate_series(0, 19) n""",
    """INSERT INTO conversation_participant (conversation_id, user_id, role, version)
    SELECT pg_temp.id(8, n), pg_temp.id(1, who), 'owner', 2
    FROM generate_series(0, 19) n CROSS JOIN (VALUES (1), (2)) w (who)""",
    """INSERT INTO message (id, conversation_id, sender_id, content, sent_version, version, created_at, payload,
        content_type)
    SELECT pg_temp.id(8, 1000 * n + k), pg_temp.id(8, n), pg_temp.id(1, 1 + k % 2), 'Hello number ' || k, 2 + k, 2 + k,
        now() - interval '1 day', CASE WHEN k = 2 THEN '{{"type": "poll", "options": ["a", "b"]}}'::jsonb END,
        CASE WHEN k = 2 THEN 'poll' ELSE 'text' END
    FROM generate_series(0, 19) n, generate_series(1, 10) k""",
    """INSERT INTO conversation_participant (conversation_id, user_id, role, version)
    SELECT pg_temp.id(8, 0), pg_temp.id(1, n), 'member', 2 FROM generate_series(10, 29) n""",
    # A hundred unread messages in each other conversation of Mallory.
    """INSERT INTO message (id, conversation_id, sender_id, content, sent_version, version, created_at)
    SELECT pg_temp.id(3, 1000 * n + k), pg_temp.id(2, n), pg_temp.id(1, 2 + n % 1000), '{words} ' || k, 2 + k, 2 + k,
        now() - interval '1 day'
    FROM generate_series(1, {conversations} - 1) n, generate_series(1, 100) k""",
    # The large conversation. It has messages that mention everyone, the last ones long, and Mallory's, with threads.
    """INSERT INTO message (id, conversation_id, sender_id, content, sent_version, version, loud_mentions, created_at,
        is_pinned, pinned_at)
    SELECT pg_temp.id(4, n), pg_temp.id(2, 0), pg_temp.id(1, 2 + {muted} + n % 1000),
        CASE WHEN n > {messages} - 1000 THEN left(repeat('{words} ', 200), 10000) ELSE '{words} ' || n END,
        2 + n, 2 + n, '{{everyone}}', now() - interval '1 hour', n > {messages} - {pins}, now()
    FROM generate_series(1, {messages}) n""",
    """INSERT INTO message (id, conversation_id, sender_id, content, sent_version, version, thread_order, reply_count,
        created_at, content_type, payload, poll_counts, poll_voters)
    SELECT pg_temp.id(5, n), pg_temp.id(2, 0), pg_temp.id(1, 0), left(repeat('{words} ', 200), 10000),
        500000 + n, 500000 + n, 120, 120, now(), CASE WHEN n = 2 THEN 'poll' ELSE 'text' END,
        CASE WHEN n = 2 THEN '{{"type": "poll", "options": ["a", "b"]}}'::jsonb END,
        CASE WHEN n = 2 THEN '{{1,2}}'::int[] END, 0
    FROM generate_series(1, 1000) n""",
    """INSERT INTO message (id, conversation_id, sender_id, content, sent_version, version, parent_message_id,
        thread_root_id, thread_order, created_at)
    SELECT pg_temp.id(6, 1000 * n + k), pg_temp.id(2, 0), pg_temp.id(1, 2 + {muted} + k), '{words}',
        600000 + 120 * n + k, 600000 + 120 * n + k, pg_temp.id(5, n), pg_temp.id(5, n), k, now()
    FROM generate_series(1, 1000) n, generate_series(1, 120) k""",
    """INSERT INTO message_search (message_id, conversation_id, created_at, words)
    SELECT id, conversation_id, created_at, search_words(conversation_id, content, payload, mentions, loud_mentions,
        '{{}}')
    FROM message""",
    """INSERT INTO thread_follow (root_id, user_id, conversation_id, has_replied, user_version)
    SELECT pg_temp.id(5, n), pg_temp.id(1, who), pg_temp.id(2, 0), true, n FROM generate_series(1, 1000) n,
        generate_series(0, 120) who WHERE who <> 1""",
    """INSERT INTO message_reaction (message_id, user_id, emoji, conversation_id, version, author_id)
    SELECT pg_temp.id(5, 1 + n % 1000), pg_temp.id(1, 2 + {muted} + n / 1000), '👍', pg_temp.id(2, 0), n,
        pg_temp.id(1, 0)
    FROM generate_series(0, {messages} - 1) n""",
    """INSERT INTO message_star (user_id, message_id, conversation_id, user_version, starred_at)
    SELECT pg_temp.id(1, 0), pg_temp.id(4, {messages} - n), pg_temp.id(2, 0), n, now() - n * interval '1 s'
    FROM generate_series(0, {stars} - 1) n""",
    """INSERT INTO user_relationship (from_user_id, to_user_id, type, status, from_version)
    SELECT pg_temp.id(1, 0), pg_temp.id(1, n), 'mute', 'active', n FROM generate_series(2, 1 + {muted}) n""",
    """INSERT INTO user_relationship (from_user_id, to_user_id, type, status)
    SELECT pg_temp.id(1, n), pg_temp.id(1, 0), 'friend', 'pending' FROM generate_series(2, {people} / 2) n""",
    """INSERT INTO message_edit (id, message_id, content, edited_by, version, conversation_id)
    SELECT pg_temp.id(9, n), pg_temp.id(5, 1), repeat('{words} ', 150), pg_temp.id(1, 0), n, pg_temp.id(2, 0)
    FROM generate_series(1, {edits}) n""",
    """INSERT INTO poll_vote (message_id, user_id, conversation_id, options, version)
    SELECT pg_temp.id(5, 2), pg_temp.id(1, n), pg_temp.id(2, 0), '{{0}}', n FROM generate_series(2, {crowd}) n""",
    """INSERT INTO report (conversation_id, message_id, reporter_id, reason)
    SELECT pg_temp.id(2, 0), pg_temp.id(5, 1), pg_temp.id(1, n), repeat('Rude ', 99)
    FROM generate_series(2, {crowd}) n""",
    """INSERT INTO draft (user_id, conversation_id, content, user_version)
    SELECT pg_temp.id(1, 0), pg_temp.id(2, n), repeat('{words} ', 160), n FROM generate_series(0, {drafts} - 1) n""",
    """INSERT INTO scheduled_message (id, sender_id, conversation_id, words, send_at, user_version)
    SELECT pg_temp.id(10, n), pg_temp.id(1, 0), pg_temp.id(2, 0),
        jsonb_build_object('content', repeat('{words} ', 160), 'content_type', 'text'), now() + interval '1 year', n
    FROM generate_series(1, {scheduled}) n""",
    "SET session_replication_role = origin",
    "VACUUM (FREEZE, ANALYZE)",
)


async def fill(db: "asyncpg.Connection[asyncpg.Record]", size: float) -> Ids:
    """Fill a new database. `size` is the share of the limits that the account reaches."""
    conversations = int(MAX_RESUMED * size)
    people = max(CROWD + 10_000, int(100_000 * size))
    figures: dict[str, object] = {
        "people": people,
        "conversations": conversations,
        "busy": BUSY,
        "crowd": CROWD,
        "messages": int(100_000 * size),
        "muted": int(5_000 * size),
        "stars": int(10_000 * size),
        "edits": int(1_000 * size),
        "drafts": int(5_000 * size),
        "pins": MAX_PINS,
        "scheduled": MAX_SCHEDULED,
        "words": WORDS,
    }
    await db.execute(HELPERS)
    for statement in STATEMENTS:
        await db.execute(statement.format(**figures))
    busy = [UserId(_id(11, n)) for n in range(1, MAX_PAGE + 1)]
    strangers = [UserId(_id(1, people - n)) for n in range(500)]
    return Ids(
        of_mallory=Objects(
            MALLORY, ConversationId(_id(2, 0)), MessageId(_id(5, 1)), MessageId(_id(5, 2)), strangers, busy,
            [UserId(_id(1, CROWD - n)) for n in range(100)], UserId(_id(1, CROWD // 2)),
            [ConversationId(_id(2, n)) for n in range(conversations)],
        ),
        of_bob=Objects(
            BOB, ConversationId(_id(8, 0)), MessageId(_id(8, 1)), MessageId(_id(8, 2)), [UserId(_id(1, 2))], busy,
            [UserId(_id(1, 10 + n)) for n in range(20)], UserId(_id(1, 5)),
            [ConversationId(_id(8, n)) for n in range(20)],
        ),
    )  # fmt: skip
