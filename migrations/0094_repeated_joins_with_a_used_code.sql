-- A participant who repeats a join gets its result, even if the join was the last use of the code.
CREATE OR REPLACE FUNCTION entrance(conversation uuid, member uuid, code text) RETURNS TABLE (
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
                -- A join that is repeated after the last use has the result of the first one.
                ELSE c.invite_code = code AND (p.status = 'active' OR (
                    (c.invite_expires_at > now() OR c.invite_expires_at IS NULL)
                    AND (c.invite_uses_left > 0 OR c.invite_uses_left IS NULL))) END
        OFFSET 0;
    END;
