-- The functions return `held` if they wait for a conversation longer than `lock_timeout`. Older workers do not limit that.
CREATE FUNCTION lock_conversations(ids uuid[], passes_held boolean) RETURNS uuid[]
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    IF passes_held THEN
        RETURN ARRAY(SELECT c.id FROM conversation c WHERE c.id = ANY(ids) ORDER BY c.id FOR NO KEY UPDATE SKIP LOCKED);
    END IF;
    BEGIN
        RETURN ARRAY(SELECT c.id FROM conversation c WHERE c.id = ANY(ids) ORDER BY c.id FOR NO KEY UPDATE);
    EXCEPTION WHEN lock_not_available THEN
        RETURN '{}';
    END;
END
$$;
REVOKE EXECUTE ON FUNCTION lock_conversations(uuid[], boolean) FROM PUBLIC;
CREATE OR REPLACE FUNCTION send_messages(input json, passes_held boolean, patience text) RETURNS TABLE (
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

    -- 2. Locks. Changes of roles, settings and blocks take the same ones. So the results of the next step stay true
    --    until the commit.
    locked := lock_conversations(asked, passes_held);
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
CREATE OR REPLACE FUNCTION change_reactions(
    input json, passes_held boolean, patience text, most_of_message integer, most_of_user integer
) RETURNS TABLE (
    place integer, outcome text, wait_ms integer, emoji text, version bigint, total integer, is_from_before boolean
) LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
#variable_conflict use_column
DECLARE
    items reaction_request[];
    asked uuid[];
    locked uuid[];
    judged reaction_outcome[];
BEGIN
    -- 1. Locks of the conversations, except of those in which the user does not take part (0065).
    items := ARRAY(SELECT i FROM json_populate_recordset(NULL::reaction_request, input) i);
    asked := ARRAY(
        SELECT i.conversation_id FROM unnest(items) i
        JOIN conversation_participant p ON p.conversation_id = i.conversation_id AND p.user_id = i.user_id
        WHERE p.status = 'active'
    );
    locked := lock_conversations(asked, passes_held);
    -- The rows that follow may be locked by transactions that do not hold the conversation (0062).
    patience := set_config('lock_timeout', patience, true);

    -- 2. The outcome and the version of each request, after the lock. `there` is the user's reaction that is not
    --    removed, which may have another spelling.
    WITH found AS (
        SELECT i.*, p.clock, p.is_here, p.obstacle, p.wait_ms, m.sender_id AS author_id, m.reactions,
            m.sent_version <= p.hidden_until AS is_from_before, coalesce(there.emoji, i.normal) AS emoji,
            there.emoji IS NOT NULL AS is_there, coalesce((
                SELECT r.version FROM message_reaction r
                WHERE r.message_id = i.message_id AND r.user_id = i.user_id AND r.emoji = i.normal
            ), m.version) AS version
        FROM unnest(items) i
        LEFT JOIN LATERAL part_in(i.conversation_id, i.user_id) p ON true
        LEFT JOIN message m ON m.id = i.message_id AND (m.conversation_id = i.conversation_id) IS TRUE
            AND NOT m.is_deleted AND m.sent_version > p.visible_after
        LEFT JOIN LATERAL (
            SELECT r.emoji FROM message_reaction r
            WHERE r.message_id = i.message_id AND r.user_id = i.user_id AND NOT r.is_removed
                AND (r.emoji = i.normal OR (NOT i.is_added
                    AND translate(r.emoji, E'\uFE0E\uFE0F', '') = translate(i.typed, E'\uFE0E\uFE0F', '')))
            ORDER BY r.emoji = i.typed DESC, r.emoji = i.normal DESC LIMIT 1
        ) there ON true
    ), checked AS (
        SELECT f.*, CASE
            WHEN f.author_id IS NULL THEN 'missing'
            WHEN NOT f.is_here THEN 'inactive'
            -- A repeated reaction and a removal reach nobody, so they need no permission to send.
            WHEN f.is_added AND NOT f.is_there AND f.obstacle <> 'slow' THEN f.obstacle
            WHEN f.is_added AND NOT f.is_there AND f.wait_ms > 0 THEN 'slow'
            WHEN f.conversation_id <> ALL(asked) THEN 'changed'
            WHEN f.conversation_id <> ALL(locked) THEN 'held'
            WHEN f.is_added = f.is_there THEN 'unchanged'
            WHEN f.is_added AND most_of_user <= (
                SELECT count(*) FROM message_reaction o
                WHERE o.message_id = f.message_id AND o.user_id = f.user_id AND o.emoji <> f.emoji
            ) THEN 'too_many_of_user'
            WHEN f.is_added AND NOT f.reactions ? f.emoji THEN 'new'
            ELSE 'stored' END AS outcome
        FROM found f
    ), ranked AS (
        SELECT c.*, min(c.place) OVER (PARTITION BY c.message_id, c.emoji, c.outcome) AS first_place FROM checked c
    ), fitted AS (
        SELECT r.*, CASE
            WHEN r.outcome <> 'new' THEN r.outcome
            WHEN (SELECT count(*) FROM jsonb_object_keys(r.reactions))
                + dense_rank() OVER (PARTITION BY r.message_id, r.outcome ORDER BY r.first_place) > most_of_message
                THEN 'too_many_of_message'
            ELSE 'stored' END AS fitting
        FROM ranked r
    ), numbered AS (
        SELECT f.*, CASE WHEN f.fitting = 'stored'
                THEN f.clock + row_number() OVER (PARTITION BY f.conversation_id, f.fitting ORDER BY f.place)
                ELSE f.version END AS own_version,
            greatest(0, coalesce((f.reactions ->> f.emoji)::integer, 0) + sum(CASE WHEN f.is_added THEN 1 ELSE -1 END)
                OVER (PARTITION BY f.message_id, f.emoji, f.fitting ORDER BY f.place)) AS total
        FROM fitted f
    )
    SELECT array_agg(ROW(n.fitting, n.wait_ms, n.emoji, n.own_version, n.total, n.is_from_before, n.author_id)
        ::reaction_outcome ORDER BY n.place)
    INTO judged FROM numbered n;

    -- 3. The versions of conversations and the counts in messages, once each, because an update per reaction would
    --    leave as many dead rows.
    UPDATE conversation c SET version = f.version
    FROM (
        SELECT s.conversation_id, max(s.version) AS version
        FROM unnest(items, judged) s WHERE s.outcome = 'stored' GROUP BY s.conversation_id
    ) f
    WHERE c.id = f.conversation_id AND c.id = ANY(locked);
    UPDATE message m SET reactions = (m.reactions || f.counts) - f.gone
    FROM (
        SELECT l.conversation_id, l.message_id, jsonb_object_agg(l.emoji, l.total) AS counts,
            coalesce(array_agg(l.emoji) FILTER (WHERE l.total = 0), '{}') AS gone
        FROM (
            SELECT DISTINCT ON (s.message_id, s.emoji) s.conversation_id, s.message_id, s.emoji, s.total
            FROM unnest(items, judged) s WHERE s.outcome = 'stored' ORDER BY s.message_id, s.emoji, s.place DESC
        ) l
        GROUP BY l.conversation_id, l.message_id
    ) f
    WHERE m.id = f.message_id AND (m.conversation_id = f.conversation_id) IS TRUE;

    -- 4. The reactions. A removed one keeps its row, so that clients that were away learn of it.
    INSERT INTO message_reaction (message_id, user_id, emoji, conversation_id, version, author_id, created_at)
    SELECT s.message_id, s.user_id, s.emoji, s.conversation_id, s.version, s.author_id, clock_timestamp()
    FROM unnest(items, judged) s WHERE s.outcome = 'stored' AND s.is_added
    ON CONFLICT (message_id, user_id, emoji) DO UPDATE SET is_removed = false, version = excluded.version,
        created_at = excluded.created_at;
    UPDATE message_reaction r SET is_removed = true, version = s.version
    FROM unnest(items, judged) s
    WHERE s.outcome = 'stored' AND NOT s.is_added
        AND r.message_id = s.message_id AND r.user_id = s.user_id AND r.emoji = s.emoji;

    RETURN QUERY SELECT s.place, s.outcome, s.wait_ms, s.emoji, s.version, s.total, s.is_from_before
    FROM unnest(items, judged) s;
END
$$;
