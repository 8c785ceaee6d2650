-- Joins of many users are made by one statement, as reactions are changed (docs/decisions/0075).

-- A user who joins a conversation. The fields have the names of those of `JoinRequest` in server/queries/joins.py.
CREATE TYPE join_request AS (place integer, conversation_id uuid, user_id uuid, invite_code text);

-- The outcome of a join. `version` is that of the participation, and `participant_count` the count after it. The version
-- after `version` is that of a system message, if there `is_posted` one.
CREATE TYPE join_outcome AS (
    outcome text, max_participants integer, version bigint, participant_count integer, is_posted boolean
);

-- Returns whether a user may join a conversation, with the outcome `stored` if so, and what the join needs to know of
-- it. Without a row, the conversation is not open to the user.
CREATE FUNCTION entrance(conversation uuid, member uuid, code text) RETURNS TABLE (
    outcome text, clock bigint, participant_count integer, max_participants integer, uses_left integer,
    are_posted boolean
) LANGUAGE sql STABLE
    BEGIN ATOMIC
        SELECT CASE
                WHEN p.status = 'banned' THEN 'banned'
                -- An invitation counts only while its sender may still add users.
                WHEN p.status = 'invited' AND NOT c.is_public AND code IS NULL AND invited_as(p) IS NULL
                    THEN 'uninvited'
                WHEN p.status IS DISTINCT FROM 'active' AND c.participant_count >= c.max_participants THEN 'full'
                WHEN NOT u.is_active OR u.is_deleted THEN 'inactive'
                WHEN p.status = 'active' THEN 'unchanged'
                ELSE 'stored' END,
            c.version, c.participant_count, c.max_participants, c.invite_uses_left,
            coalesce((c.settings ->> 'system_messages')::boolean, true)
        FROM conversation c
        JOIN "user" u ON u.id = member
        LEFT JOIN conversation_participant p ON p.conversation_id = c.id AND p.user_id = member
        WHERE c.id = conversation AND c.type IN ('group', 'channel') AND c.is_active AND NOT c.is_deleted
            AND CASE WHEN code IS NULL THEN c.is_public OR p.status IN ('active', 'invited')
                ELSE c.invite_code = code AND (c.invite_expires_at > now() OR c.invite_expires_at IS NULL)
                    AND (c.invite_uses_left > 0 OR c.invite_uses_left IS NULL) END
        OFFSET 0;
    END;

-- Makes many users participants of many conversations, and returns the outcome of each, as change_reactions() does for
-- reactions. server/queries/joins.py lists the outcomes. There is at most one request per user. Conversations with more
-- than `most_posted` participants get no system message.
CREATE FUNCTION join_conversations(
    input json, passes_held boolean, patience text, most_posted integer, most_memberships integer
) RETURNS TABLE (
    place integer, outcome text, max_participants integer, message json, participant json, participant_count integer,
    event json
) LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
#variable_conflict use_column
DECLARE
    items join_request[];
    asked join_request[];
    locked uuid[];
    members uuid[];
    judged join_outcome[];
BEGIN
    -- 1. Locks of the conversations that the users may join, and of these users. Others are refused without a lock
    --    (0065). A user whom another transaction holds is skipped, because others would wait for that user.
    items := ARRAY(SELECT i FROM json_populate_recordset(NULL::join_request, input) i);
    asked := ARRAY(
        SELECT i FROM unnest(items) i CROSS JOIN LATERAL entrance(i.conversation_id, i.user_id, i.invite_code) e
        WHERE e.outcome = 'stored'
    );
    locked := lock_conversations(ARRAY(SELECT a.conversation_id FROM unnest(asked) a), passes_held);
    patience := set_config('lock_timeout', patience, true);
    members := ARRAY(SELECT a.user_id FROM unnest(asked) a WHERE a.conversation_id = ANY(locked));
    members := ARRAY(SELECT u.id FROM "user" u WHERE u.id = ANY(members) ORDER BY u.id FOR NO KEY UPDATE SKIP LOCKED);

    -- 2. The outcome and the version of each request, after the locks. Memberships are counted exactly only if the
    --    cheaper count, which includes deleted conversations, exceeds the limit.
    WITH checked AS (
        SELECT i.*, e.clock, e.participant_count, e.max_participants, e.uses_left, e.are_posted, CASE
            WHEN e.outcome IS NULL THEN 'missing'
            WHEN e.outcome <> 'stored' THEN e.outcome
            WHEN i.place <> ALL(ARRAY(SELECT a.place FROM unnest(asked) a)) THEN 'changed'
            WHEN i.conversation_id <> ALL(locked) THEN 'held'
            WHEN i.user_id <> ALL(members) THEN 'user_held'
            WHEN CASE WHEN (
                SELECT count(*) FROM conversation_participant p WHERE p.user_id = i.user_id AND p.status = 'active'
            ) >= most_memberships THEN (
                SELECT count(*) FROM conversation_participant p
                JOIN conversation c ON c.id = p.conversation_id AND NOT c.is_deleted
                WHERE p.user_id = i.user_id AND p.status = 'active'
            ) >= most_memberships ELSE false END THEN 'too_many'
            ELSE 'stored' END AS outcome
        FROM unnest(items) i LEFT JOIN LATERAL entrance(i.conversation_id, i.user_id, i.invite_code) e ON true
    ), used AS (
        SELECT c.*, row_number() OVER (
                PARTITION BY c.conversation_id, c.outcome, c.invite_code IS NULL ORDER BY c.place
            ) AS use_number
        FROM checked c
    ), admitted AS (
        SELECT u.*, CASE WHEN u.outcome = 'stored' AND u.invite_code IS NOT NULL AND u.use_number > u.uses_left
                THEN 'missing' ELSE u.outcome END AS admission
        FROM used u
    ), numbered AS (
        SELECT a.*, row_number() OVER (PARTITION BY a.conversation_id, a.admission ORDER BY a.place) AS number
        FROM admitted a
    ), counted AS (
        SELECT n.*, n.participant_count + n.number AS total,
            CASE WHEN n.are_posted THEN greatest(0, most_posted - n.participant_count) ELSE 0 END AS posted,
            CASE WHEN n.admission = 'stored' AND n.participant_count + n.number > n.max_participants THEN 'full'
                ELSE n.admission END AS final
        FROM numbered n
    )
    -- Each of the first joins is followed by its system message.
    SELECT array_agg(ROW(c.final, c.max_participants, c.clock + c.number + least(c.number - 1, c.posted), c.total,
        c.number <= c.posted)::join_outcome ORDER BY c.place)
    INTO judged FROM counted c;

    -- 3. The conversations, once each, because an update per join would leave as many dead rows. Then the users, whose
    --    user version tells their devices of the conversation.
    UPDATE conversation c SET version = f.version, access_version = f.joined, participant_count = f.participant_count,
        last_activity_at = now(), message_count = c.message_count + f.posted,
        last_message_at = CASE WHEN f.posted > 0 THEN now() ELSE c.last_message_at END,
        invite_uses_left = c.invite_uses_left - f.uses
    FROM (
        SELECT s.conversation_id, max(s.version + s.is_posted::integer) AS version, max(s.version) AS joined,
            max(s.participant_count) AS participant_count, count(*) FILTER (WHERE s.is_posted) AS posted,
            count(s.invite_code) AS uses
        FROM unnest(items, judged) s WHERE s.outcome = 'stored' GROUP BY s.conversation_id
    ) f
    WHERE c.id = f.conversation_id AND c.id = ANY(locked);
    UPDATE "user" u SET version = u.version + 1
    FROM unnest(items, judged) s WHERE s.outcome = 'stored' AND u.id = s.user_id AND u.id = ANY(members);

    -- 4. The participants, as participants.ADD does for users who join themselves, and the system messages.
    INSERT INTO conversation_participant AS p (conversation_id, user_id, role, version, joined_version,
        last_read_version)
    SELECT s.conversation_id, s.user_id, 'member', s.version, s.version, s.version - 1
    FROM unnest(items, judged) s WHERE s.outcome = 'stored'
    ON CONFLICT (conversation_id, user_id) DO UPDATE SET
        role = CASE WHEN p.role = 'guest' THEN p.role ELSE coalesce(invited_as(p), excluded.role) END,
        invited_by = CASE WHEN p.status = 'invited' THEN p.invited_by END,
        status = 'active', joined_at = now(), left_at = NULL, left_version = 0,
        version = excluded.version, joined_version = excluded.joined_version,
        user_version = (SELECT u.version FROM "user" u WHERE u.id = excluded.user_id),
        last_read_version = greatest(p.last_read_version, excluded.last_read_version),
        unread_from_id = NULL, unread_from_version = NULL,
        can_add_members = false, can_remove_members = false, can_edit_conversation = false,
        can_delete_messages = false, can_pin_messages = false;

    -- The planner could look for the messages by an index that has the conversation only, and read all of its messages.
    RETURN QUERY WITH posted AS (
        INSERT INTO message AS m (conversation_id, sender_id, content, content_type, metadata, is_system_message,
            system_message_type, sent_version, version)
        SELECT s.conversation_id, s.user_id, 'joined', 'system', '{}', true, 'join', s.version + 1, s.version + 1
        FROM unnest(items, judged) s WHERE s.outcome = 'stored' AND s.is_posted
        RETURNING m.sender_id, m.conversation_id, message_json(m) AS message
    )
    SELECT s.place, s.outcome, s.max_participants, m.message,
        CASE WHEN p.user_id IS NOT NULL THEN participant_json(p) END, s.participant_count,
        CASE WHEN p.user_id IS NOT NULL THEN participant_event(p, s.participant_count) END
    FROM unnest(items, judged) s
    LEFT JOIN conversation_participant p
        ON s.outcome = 'stored' AND p.conversation_id = s.conversation_id AND p.user_id = s.user_id
    LEFT JOIN posted m
        ON s.outcome = 'stored' AND m.conversation_id = s.conversation_id AND m.sender_id = s.user_id;
END
$$;

REVOKE EXECUTE ON FUNCTION entrance(uuid, uuid, text), join_conversations(json, boolean, text, integer, integer)
    FROM PUBLIC;
