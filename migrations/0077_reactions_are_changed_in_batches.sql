-- Reactions of many users are changed by one statement, as messages are stored (docs/decisions/0075).

-- Returns what the functions that change messages need to know about a user who takes part in a conversation. Messages
-- sent up to `hidden_until` may be hidden from some participants. The rest is as in sender_part().
CREATE FUNCTION part_in(conversation uuid, member uuid) RETURNS TABLE (
    clock bigint, is_here boolean, obstacle text, wait_ms integer, visible_after bigint, hidden_until bigint
) LANGUAGE sql STABLE
    BEGIN ATOMIC
        SELECT c.version, u.is_active AND NOT u.is_deleted, obstacle_of(c, p, u.is_active AND NOT u.is_deleted),
            slow_mode_wait(c, p), visible_after(c, p),
            CASE WHEN c.settings ->> 'history' = 'from_joining' THEN c.access_version ELSE 0 END
        FROM conversation_participant p
        JOIN conversation c ON c.id = p.conversation_id AND NOT c.is_deleted
        JOIN "user" u ON u.id = p.user_id
        WHERE p.conversation_id = conversation AND p.user_id = member AND p.status = 'active'
        OFFSET 0;
    END;

-- A reaction to add or remove. The fields have the names of those in `_encoded` in server/queries/reactions.py.
-- `normal` is the spelling in which new reactions are stored, and `typed` is that of the frame.
CREATE TYPE reaction_request AS (
    place integer, conversation_id uuid, message_id uuid, user_id uuid, normal text, typed text, is_added boolean
);

-- The outcome for a reaction. `total` is the number of users with this emoji after the change.
CREATE TYPE reaction_outcome AS (
    outcome text, wait_ms integer, emoji text, version bigint, total integer, is_from_before boolean, author_id uuid
);

-- Adds and removes reactions of many users in many conversations, and returns the outcome of each, as send_messages()
-- does for messages. server/queries/reactions.py lists the outcomes. There is at most one request per user and message.
CREATE FUNCTION change_reactions(
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
    -- 1. Locks of the conversations, in the order of the ids. Those in which the user does not take part are not locked
    --    (0065).
    items := ARRAY(SELECT i FROM json_populate_recordset(NULL::reaction_request, input) i);
    asked := ARRAY(
        SELECT i.conversation_id FROM unnest(items) i
        JOIN conversation_participant p ON p.conversation_id = i.conversation_id AND p.user_id = i.user_id
        WHERE p.status = 'active'
    );
    IF passes_held THEN
        locked := ARRAY(
            SELECT c.id FROM conversation c WHERE c.id = ANY(asked) ORDER BY c.id FOR NO KEY UPDATE SKIP LOCKED
        );
    ELSE
        locked := ARRAY(SELECT c.id FROM conversation c WHERE c.id = ANY(asked) ORDER BY c.id FOR NO KEY UPDATE);
    END IF;
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

REVOKE EXECUTE ON FUNCTION part_in(uuid, uuid), change_reactions(json, boolean, text, integer, integer) FROM PUBLIC;
