-- `send` is a function of plain statements, which returns the outcome of each message (docs/decisions/0073).

-- Returns why a participant may not write in a conversation, whichever the frame, or null if they may.
-- `is_here` states whether the account is active.
-- If slow mode applies to the participant, the reason is 'slow', and slow_mode_wait() returns how long they have to
-- wait.
CREATE FUNCTION obstacle_of(c conversation, p conversation_participant, is_here boolean) RETURNS text LANGUAGE sql STABLE
    RETURN CASE
        WHEN NOT is_here THEN 'inactive'
        WHEN c.is_archived THEN 'archived'
        WHEN NOT may_send(c, p.role, true) THEN 'role'
        WHEN c.type = 'direct' AND NOT may('write', p.user_id,
            CASE WHEN c.direct_low = p.user_id THEN c.direct_high ELSE c.direct_low END) THEN 'unwanted'
        WHEN NOT may_send(c, p.role, false) THEN 'slow' END;

-- Returns the same, but looks up the account. Statements that have read the account call obstacle_of(), which PostgreSQL
-- inlines because it has no subquery.
CREATE OR REPLACE FUNCTION obstacle(c conversation, p conversation_participant) RETURNS text LANGUAGE sql STABLE
    RETURN obstacle_of(c, p, EXISTS (SELECT FROM "user" u WHERE u.id = p.user_id AND u.is_active AND NOT u.is_deleted));

-- A message to store. The fields have the names of those in `_encoded` in server/queries/sending.py (a test compares
-- them).
CREATE TYPE outgoing_message AS (
    place integer, message_id uuid, conversation_id uuid, sender_id uuid, content text, content_type text,
    payload jsonb, formatted_content text, mentions uuid[], loud_mentions text[], hashtags text[], metadata jsonb,
    parent_message_id uuid, also_in_conversation boolean, quoted_message_id uuid, forwarded_from_id uuid,
    forwarded_sender_id uuid, source_conversation_id uuid, source_edited_at timestamptz, poll_counts integer[]
);

-- The outcome for a message. `from_last` numbers the replies to one thread in a batch, from the newest one.
CREATE TYPE send_outcome AS (
    outcome text, wait_ms integer, is_slow boolean, root_id uuid, from_last bigint, version bigint,
    created_at timestamptz, expires_at timestamptz
);

-- Returns the message with an id, if it is in a conversation. The planner always finds it by the id. IS TRUE keeps it
-- from using an index on the conversation, and OFFSET 0 from adding conditions of the caller (docs/decisions/0008).
CREATE FUNCTION message_in(conversation uuid, id uuid)
    RETURNS TABLE (sent_version bigint, is_deleted boolean, root_id uuid) LANGUAGE sql STABLE
    BEGIN ATOMIC
        SELECT m.sent_version, m.is_deleted, coalesce(m.thread_root_id, m.id) FROM message m
        WHERE m.id = message_in.id AND (m.conversation_id = conversation) IS TRUE OFFSET 0;
    END;

-- Returns what send_messages() needs to know about a sender who takes part in a conversation. `obstacle` is the result
-- of obstacle_of(). `is_candidate` is the part of it that costs little: it leaves out blocks in direct conversations.
-- The planner computes only the columns that a statement uses. OFFSET 0 makes it start from the participant's row.
CREATE FUNCTION sender_part(conversation uuid, sender uuid) RETURNS TABLE (
    clock bigint, is_candidate boolean, obstacle text, wait_ms integer, may_be_loud boolean, visible_after bigint,
    expires_after interval
) LANGUAGE sql STABLE
    BEGIN ATOMIC
        SELECT c.version,
            u.is_active AND NOT u.is_deleted AND may_send(c, p.role, slow_mode_wait(c, p) = 0),
            obstacle_of(c, p, u.is_active AND NOT u.is_deleted),
            slow_mode_wait(c, p),
            c.type <> 'direct' AND can(p.role, 'moderator', false),
            visible_after(c, p),
            CASE WHEN c.settings <> '{}' THEN make_interval(secs => (c.settings ->> 'expire_after_seconds')::float8) END
        FROM conversation_participant p
        JOIN conversation c ON c.id = p.conversation_id AND NOT c.is_deleted
        JOIN "user" u ON u.id = p.user_id
        WHERE p.conversation_id = conversation AND p.user_id = sender AND p.status = 'active'
        OFFSET 0;
    END;

-- Stores messages of many users in many conversations, and returns the outcome of each message.
-- server/queries/sending.py lists the outcomes. Each statement sees everything that was committed before it began, so
-- the order of the steps matters. The comment of a step states what it needs, and what would fail elsewhere.
--
-- `passes_held`: messages to a conversation that another transaction holds get the outcome `held`, instead of waiting.
-- `patience`: max time to wait for any row after the conversations, as a `lock_timeout`.
CREATE FUNCTION send_messages(input json, passes_held boolean, patience text) RETURNS TABLE (
    place integer, outcome text, wait_ms integer, version bigint, created_at timestamptz, expires_at timestamptz,
    root_id uuid, reply_count integer, thread_order integer
) LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
#variable_conflict use_column
DECLARE
    items outgoing_message[];
    words tsvector[];
    asked uuid[];
    locked uuid[];
    taken uuid[];
    judged send_outcome[];
    has_replies boolean;
    has_slow boolean;
    root_ids uuid[];
    reply_counts integer[];
    thread_orders integer[];
BEGIN
    -- 1. Words. They take up to 6 ms, so under the lock everyone in the conversation would wait for them. Messages of
    --    users who may not send get none. Their conversations are not locked, so they delay nobody (0065).
    SELECT array_agg(i), array_agg(
            CASE WHEN p.is_candidate
                THEN search_words(i.conversation_id, i.content, i.payload, i.mentions, i.loud_mentions, i.hashtags) END
        ), array_agg(i.message_id)
    INTO items, words, taken
    FROM json_populate_recordset(NULL::outgoing_message, input) i
    LEFT JOIN LATERAL sender_part(i.conversation_id, i.sender_id) p ON true;
    asked := ARRAY(SELECT i.conversation_id FROM unnest(words, items) i (words) WHERE i.words IS NOT NULL);

    -- 2. Locks, in the order of the ids, because two batches in different orders would deadlock. Changes of roles,
    --    settings and blocks take the same lock. So the results of the next step stay true until the commit.
    IF passes_held THEN
        locked := ARRAY(
            SELECT c.id FROM conversation c WHERE c.id = ANY(asked) ORDER BY c.id FOR NO KEY UPDATE SKIP LOCKED
        );
    ELSE
        locked := ARRAY(SELECT c.id FROM conversation c WHERE c.id = ANY(asked) ORDER BY c.id FOR NO KEY UPDATE);
    END IF;
    -- From here on, others wait for this transaction. The rows that follow may be locked by transactions that do not
    -- hold the conversation: followers, authors, an id that is not committed (0062).
    patience := set_config('lock_timeout', patience, true);

    -- 3. The outcome and the version of each message, after the lock. Before it, a message of a user who was removed
    --    meanwhile would be stored, or a reply to a deleted message. Two messages would get one version.
    taken := ARRAY(SELECT m.id FROM message m WHERE m.id = ANY(taken));
    SELECT array_agg(ROW(j.outcome, j.wait_ms, j.is_slow, j.root_id, j.from_last, j.version, j.created_at,
            j.created_at + j.expires_after)::send_outcome ORDER BY j.place),
        bool_or(j.outcome = 'stored' AND j.root_id IS NOT NULL), bool_or(j.outcome = 'stored' AND j.is_slow)
    INTO judged, has_replies, has_slow
    FROM (
        SELECT k.*, clock_timestamp() AS created_at,
            k.clock + row_number() OVER (PARTITION BY k.conversation_id, k.outcome ORDER BY k.place) AS version,
            row_number() OVER (PARTITION BY k.root_id, k.outcome ORDER BY k.place DESC) AS from_last
        FROM (
            SELECT i.place, i.conversation_id, p.clock, p.wait_ms, p.obstacle = 'slow' AS is_slow, p.expires_after,
                parent.root_id,
                CASE
                    WHEN i.message_id = ANY(taken) THEN 'duplicate'
                    WHEN p.clock IS NULL THEN 'no_access'
                    WHEN p.obstacle <> 'slow' THEN p.obstacle
                    WHEN i.loud_mentions <> '{}' AND NOT p.may_be_loud THEN 'loud'
                    WHEN i.parent_message_id IS NOT NULL AND parent.root_id IS NULL THEN 'missing_parent'
                    WHEN i.quoted_message_id IS NOT NULL AND quoted.root_id IS NULL THEN 'missing_quoted'
                    WHEN i.forwarded_from_id IS NOT NULL AND NOT may_forward_now(i.sender_id, i.forwarded_from_id,
                        i.source_conversation_id, i.source_edited_at) THEN 'source_changed'
                    WHEN p.wait_ms > 0 THEN 'slow'
                    WHEN i.words IS NULL OR (p.obstacle = 'slow' AND EXISTS (
                        SELECT FROM unnest(items) o
                        WHERE o.conversation_id = i.conversation_id AND o.sender_id = i.sender_id AND o.place < i.place
                    )) THEN 'changed'
                    WHEN i.conversation_id <> ALL(locked) THEN 'held'
                    ELSE 'stored'
                END AS outcome
            FROM unnest(words, items) i (words)
            LEFT JOIN LATERAL sender_part(i.conversation_id, i.sender_id) p ON true
            LEFT JOIN LATERAL message_in(i.conversation_id, i.parent_message_id) parent
                ON NOT parent.is_deleted AND parent.sent_version > p.visible_after
            LEFT JOIN LATERAL message_in(i.conversation_id, i.quoted_message_id) quoted
                ON NOT quoted.is_deleted AND quoted.sent_version > p.visible_after
        ) k
    ) j;

    -- 4. The versions of conversations, once each, because an update per message would leave as many dead rows.
    UPDATE conversation c SET version = f.version, message_count = c.message_count + f.messages,
        last_message_at = f.created_at, last_activity_at = f.created_at
    FROM (
        SELECT s.conversation_id, max(s.version) AS version, count(*) AS messages, max(s.created_at) AS created_at
        FROM unnest(items, judged) s WHERE s.outcome = 'stored' GROUP BY s.conversation_id
    ) f
    WHERE c.id = f.conversation_id AND c.id = ANY(locked);
    IF has_slow THEN
        UPDATE conversation_participant p SET last_sent_at = s.created_at FROM unnest(items, judged) s
        WHERE s.outcome = 'stored' AND s.is_slow AND p.conversation_id = s.conversation_id AND p.user_id = s.sender_id;
    END IF;

    -- 5. Threads, before the messages, because the root determines the place of a reply in its thread. The author of
    --    the root and those who replied follow the thread.
    IF has_replies THEN
        WITH roots AS (
            UPDATE message m SET reply_count = m.reply_count + f.replies, thread_order = m.thread_order + f.replies,
                version = f.version
            FROM (
                SELECT s.root_id, max(s.version) AS version, count(*) AS replies
                FROM unnest(judged) s WHERE s.outcome = 'stored' GROUP BY s.root_id
            ) f
            WHERE m.id = f.root_id
            RETURNING m.id, m.conversation_id, m.sender_id, m.reply_count, m.thread_order
        ), followed AS (
            INSERT INTO thread_follow AS t (root_id, user_id, conversation_id, has_replied, last_read_order)
            SELECT f.root_id, f.user_id, f.conversation_id, bool_or(f.has_replied), max(f.thread_order) FROM (
                SELECT r.id AS root_id, s.sender_id AS user_id, r.conversation_id, true AS has_replied,
                    (r.thread_order - s.from_last + 1)::integer AS thread_order
                FROM unnest(items, judged) s JOIN roots r ON r.id = s.root_id WHERE s.outcome = 'stored'
                UNION ALL
                SELECT r.id, r.sender_id, r.conversation_id, false, 0 FROM roots r WHERE is_unerased_now(r.sender_id)
            ) f
            GROUP BY f.root_id, f.user_id, f.conversation_id
            ON CONFLICT (root_id, user_id) DO UPDATE SET has_replied = t.has_replied OR excluded.has_replied,
                last_read_order = greatest(t.last_read_order, excluded.last_read_order)
        )
        SELECT array_agg(r.id), array_agg(r.reply_count), array_agg(r.thread_order)
        INTO root_ids, reply_counts, thread_orders FROM roots r;
    END IF;

    -- 6. The messages, and their words for search.
    INSERT INTO message (id, conversation_id, sender_id, content, content_type, payload, formatted_content, mentions,
        loud_mentions, hashtags, metadata, parent_message_id, thread_root_id, thread_order, also_in_conversation,
        quoted_message_id, forwarded_from_id, forwarded_sender_id, poll_counts, expires_at, sent_version, version,
        created_at, updated_at)
    SELECT s.message_id, s.conversation_id, s.sender_id, s.content, s.content_type, s.payload, s.formatted_content,
        s.mentions, s.loud_mentions, s.hashtags, s.metadata, s.parent_message_id, s.root_id,
        coalesce(r.thread_order - s.from_last + 1, 0), s.also_in_conversation, s.quoted_message_id,
        s.forwarded_from_id, s.forwarded_sender_id, s.poll_counts, s.expires_at, s.version, s.version, s.created_at,
        s.created_at
    FROM unnest(items, judged) s
    LEFT JOIN unnest(root_ids, thread_orders) r (id, thread_order) ON r.id = s.root_id
    WHERE s.outcome = 'stored';
    INSERT INTO message_search (message_id, conversation_id, created_at, words)
    SELECT s.message_id, s.conversation_id, s.created_at, s.words FROM unnest(words, items, judged) s (words)
    WHERE s.outcome = 'stored';

    RETURN QUERY SELECT s.place, s.outcome, s.wait_ms, s.version, s.created_at, s.expires_at, s.root_id, r.reply_count,
        coalesce(r.thread_order - s.from_last + 1, 0)::integer
    FROM unnest(items, judged) s
    LEFT JOIN unnest(root_ids, reply_counts, thread_orders) r (id, reply_count, thread_order) ON r.id = s.root_id;
END
$$;
REVOKE EXECUTE ON FUNCTION obstacle_of(conversation, conversation_participant, boolean), message_in(uuid, uuid),
    sender_part(uuid, uuid), send_messages(json, boolean, text) FROM PUBLIC;
