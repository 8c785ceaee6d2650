-- An invitation gives no more than whoever sent it may give now.
CREATE FUNCTION invited_as(p conversation_participant) RETURNS text LANGUAGE sql STABLE
    RETURN (
        SELECT CASE
            WHEN role_rank(p.role) < role_rank(i.role) THEN p.role
            WHEN i.role IN ('guest', 'member') THEN i.role
            WHEN i.role = 'moderator' THEN 'member'
            ELSE 'moderator' END
        FROM conversation_participant i
        JOIN "user" u ON u.id = i.user_id AND u.is_active AND NOT u.is_deleted
        WHERE p.status = 'invited' AND i.conversation_id = p.conversation_id AND i.user_id = p.invited_by
            AND i.status = 'active' AND can(i.role, 'admin', i.can_add_members)
    );

CREATE OR REPLACE FUNCTION invitation_json(p conversation_participant, c conversation) RETURNS json LANGUAGE sql STABLE
    RETURN json_build_object(
        'conversation_id', c.id,
        'type', c.type,
        'title', c.title,
        'description', c.description,
        'image', c.image,
        'participant_count', c.participant_count,
        'role', coalesce(invited_as(p), p.role),
        'invited_by', p.invited_by
    );
