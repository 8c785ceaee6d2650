-- Votes of many users are stored by one statement, as reactions are changed (docs/decisions/0075).

-- A vote to store. The fields have the names of those of `VoteRequest` in server/queries/polls.py. `options` are in
-- ascending order.
CREATE TYPE vote_request AS (
    place integer, conversation_id uuid, message_id uuid, user_id uuid, options integer[]
);

-- The outcome for a vote. `poll_counts` and `poll_voters` are those after the vote, and `option_count` is the number of
-- options of the poll.
CREATE TYPE vote_outcome AS (
    outcome text, wait_ms integer, option_count integer, version bigint, poll_counts integer[], poll_voters integer,
    is_anonymous boolean, is_from_before boolean
);

-- Returns whether a time as text, as the server writes it in `closes_at`, has passed. PostgreSQL accepts no offsets from
-- UTC of 16 hours or more, so they are subtracted.
CREATE FUNCTION has_passed(moment text) RETURNS boolean LANGUAGE sql VOLATILE
    RETURN (regexp_replace(moment, '(Z|[+-]\d\d:\d\d)$', '')::timestamp
        - coalesce(substring(moment, '[+-]\d\d:\d\d$'), '0')::interval) AT TIME ZONE 'UTC' <= clock_timestamp();

-- Stores, changes and withdraws votes of many users in many polls, and returns the outcome of each, as
-- change_reactions() does for reactions. server/queries/polls.py lists the outcomes. There is at most one request per
-- user and poll.
CREATE FUNCTION change_votes(input json, passes_held boolean, patience text) RETURNS TABLE (
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
        SELECT i.conversation_id FROM unnest(items) i
        JOIN conversation_participant p ON p.conversation_id = i.conversation_id AND p.user_id = i.user_id
        WHERE p.status = 'active'
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

REVOKE EXECUTE ON FUNCTION has_passed(text), change_votes(json, boolean, text) FROM PUBLIC;
