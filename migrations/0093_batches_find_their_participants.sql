-- A plan for a small table reads all participants, and then searches the batch for each of them. OFFSET 0 prevents it.
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
        SELECT i.conversation_id FROM unnest(items) i WHERE EXISTS (
            SELECT FROM conversation_participant p
            WHERE p.conversation_id = i.conversation_id AND p.user_id = i.user_id AND p.status = 'active' OFFSET 0
        )
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
CREATE OR REPLACE FUNCTION change_votes(input json, passes_held boolean, patience text) RETURNS TABLE (
    place integer, outcome text, wait_ms integer, option_count integer, version bigint, poll_counts integer[],
    poll_voters integer, is_anonymous boolean, is_from_before boolean
) LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
#variable_conflict use_column
DECLARE
    items vote_request[];
    asked uuid[];
    locked uuid[];
    judged vote_outcome[];
BEGIN
    -- 1. Locks of the conversations, except of those in which the user does not take part (0065).
    items := ARRAY(SELECT i FROM json_populate_recordset(NULL::vote_request, input) i);
    asked := ARRAY(
        SELECT i.conversation_id FROM unnest(items) i WHERE EXISTS (
            SELECT FROM conversation_participant p
            WHERE p.conversation_id = i.conversation_id AND p.user_id = i.user_id AND p.status = 'active' OFFSET 0
        )
    );
    locked := lock_conversations(asked, passes_held);
    -- The rows that follow may be locked by transactions that do not hold the conversation (0062).
    patience := set_config('lock_timeout', patience, true);

    -- 2. The outcome and the version of each request, after the lock.
    WITH found AS (
        SELECT i.*, p.clock, p.is_here, p.obstacle, p.wait_ms, m.content_type, m.payload, m.is_moderated, m.poll_counts,
            m.poll_voters, m.poll_closed_at, m.sent_version <= p.hidden_until AS is_from_before,
            coalesce(v.options, '{}') AS before, coalesce(v.version, m.version) AS version,
            jsonb_array_length(m.payload -> 'options') AS option_count
        FROM unnest(items) i
        LEFT JOIN LATERAL part_in(i.conversation_id, i.user_id) p ON true
        LEFT JOIN message m ON m.id = i.message_id AND (m.conversation_id = i.conversation_id) IS TRUE
            AND NOT m.is_deleted AND m.sent_version > p.visible_after
        LEFT JOIN poll_vote v ON v.message_id = i.message_id AND v.user_id = i.user_id
            AND (v.conversation_id = i.conversation_id) IS TRUE
    ), checked AS (
        SELECT f.*, CASE
            WHEN f.content_type IS NULL THEN 'missing'
            WHEN f.content_type <> 'poll' THEN 'no_poll'
            WHEN f.is_moderated OR f.payload IS NULL THEN 'missing'
            WHEN NOT f.is_here THEN 'inactive'
            -- A repeated vote and a withdrawal reach nobody, so they need no permission to send.
            WHEN f.options NOT IN ('{}', f.before) AND f.obstacle <> 'slow' THEN f.obstacle
            WHEN f.options NOT IN ('{}', f.before) AND f.wait_ms > 0 THEN 'slow'
            WHEN f.conversation_id <> ALL(asked) THEN 'changed'
            WHEN f.conversation_id <> ALL(locked) THEN 'held'
            WHEN f.options = f.before THEN 'unchanged'
            WHEN f.poll_closed_at IS NOT NULL OR has_passed(f.payload ->> 'closes_at') THEN 'closed'
            WHEN f.options[cardinality(f.options)] >= f.option_count THEN 'unknown_option'
            WHEN cardinality(f.options) > 1 AND NOT coalesce((f.payload ->> 'is_multiple')::boolean, false)
                THEN 'too_many_options'
            ELSE 'stored' END AS outcome
        FROM found f
    ), counted AS (
        SELECT o.place, array_agg(o.total ORDER BY o.number) AS poll_counts
        FROM (
            SELECT c.place, number, c.poll_counts[number]
                + sum((number - 1 = ANY(c.options))::integer - (number - 1 = ANY(c.before))::integer)
                    OVER (PARTITION BY c.message_id, number ORDER BY c.place) AS total
            FROM checked c CROSS JOIN generate_subscripts(c.poll_counts, 1) number WHERE c.outcome = 'stored'
        ) o
        GROUP BY o.place
    ), numbered AS (
        SELECT c.*, CASE WHEN c.outcome = 'stored'
                THEN c.clock + row_number() OVER (PARTITION BY c.conversation_id, c.outcome ORDER BY c.place)
                ELSE c.version END AS own_version,
            c.poll_voters + sum((c.options <> '{}')::integer - (c.before <> '{}')::integer)
                OVER (PARTITION BY c.message_id, c.outcome ORDER BY c.place) AS voters
        FROM checked c
    )
    SELECT array_agg(ROW(n.outcome, n.wait_ms, n.option_count, n.own_version, coalesce(o.poll_counts, '{}'), n.voters,
        coalesce((n.payload ->> 'is_anonymous')::boolean, false), n.is_from_before)::vote_outcome ORDER BY n.place)
    INTO judged FROM numbered n LEFT JOIN counted o USING (place);

    -- 3. The versions of conversations and the counts in messages, once each, because an update per vote would leave as
    --    many dead rows.
    UPDATE conversation c SET version = f.version
    FROM (
        SELECT s.conversation_id, max(s.version) AS version
        FROM unnest(items, judged) s WHERE s.outcome = 'stored' GROUP BY s.conversation_id
    ) f
    WHERE c.id = f.conversation_id AND c.id = ANY(locked);
    UPDATE message m SET poll_counts = f.poll_counts, poll_voters = f.poll_voters
    FROM (
        SELECT DISTINCT ON (s.message_id) s.conversation_id, s.message_id, s.poll_counts, s.poll_voters
        FROM unnest(items, judged) s WHERE s.outcome = 'stored' ORDER BY s.message_id, s.place DESC
    ) f
    WHERE m.id = f.message_id AND (m.conversation_id = f.conversation_id) IS TRUE;

    -- 4. The votes. A withdrawn one keeps its row, so that clients that were away learn of it.
    INSERT INTO poll_vote (message_id, user_id, conversation_id, options, version, voted_at)
    SELECT s.message_id, s.user_id, s.conversation_id, s.options, s.version, clock_timestamp()
    FROM unnest(items, judged) s WHERE s.outcome = 'stored'
    ON CONFLICT (message_id, user_id) DO UPDATE SET options = excluded.options, version = excluded.version,
        voted_at = excluded.voted_at;

    RETURN QUERY SELECT s.place, s.outcome, s.wait_ms, s.option_count, s.version, s.poll_counts, s.poll_voters,
        s.is_anonymous, s.is_from_before
    FROM unnest(items, judged) s;
END
$$;
