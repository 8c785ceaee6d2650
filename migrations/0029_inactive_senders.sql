-- Whose account is not active writes nothing, also by a socket that has not closed yet.
CREATE OR REPLACE FUNCTION obstacle(c conversation, p conversation_participant) RETURNS text LANGUAGE sql STABLE
    RETURN CASE
        WHEN NOT EXISTS (SELECT FROM "user" u WHERE u.id = p.user_id AND u.is_active AND NOT u.is_deleted) THEN 'inactive'
        WHEN c.is_archived THEN 'archived'
        WHEN NOT may_send(c, p.role, true) THEN 'role'
        WHEN c.type = 'direct' AND NOT may('write', p.user_id,
            CASE WHEN c.direct_low = p.user_id THEN c.direct_high ELSE c.direct_low END) THEN 'unwanted'
        WHEN NOT may_send(c, p.role, false) THEN 'slow' END;
