-- Own rows carry their user version in replies, too (docs/decisions/0082). Older workers ignore the field.
CREATE OR REPLACE FUNCTION preferences_json(p conversation_participant) RETURNS json LANGUAGE sql STABLE
    RETURN json_build_object(
        'pin_order', p.pin_order,
        'is_hidden', p.is_hidden,
        'is_muted', p.is_muted,
        'muted_until', p.muted_until,
        'notification_level', p.notification_level,
        'unread_from_id', p.unread_from_id,
        'user_version', p.user_version
    );
CREATE OR REPLACE FUNCTION scheduled_json(s scheduled_message) RETURNS json LANGUAGE sql STABLE
    RETURN json_build_object(
        'message_id', s.id,
        'conversation_id', s.conversation_id,
        'words', s.words,
        'send_at', s.send_at,
        'status', s.status,
        'problem', s.problem,
        'created_at', s.created_at,
        'not_before', s.not_before,
        'user_version', s.user_version
    );
CREATE OR REPLACE FUNCTION thread_json(t thread_follow) RETURNS json LANGUAGE sql STABLE
    RETURN json_build_object(
        'conversation_id', t.conversation_id,
        'root_id', t.root_id,
        'is_following', t.is_following,
        'last_read_order', t.last_read_order,
        'user_version', t.user_version
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
        'invited_by', p.invited_by,
        'user_version', p.user_version
    );
CREATE OR REPLACE FUNCTION relationship_json(r user_relationship, viewer uuid) RETURNS json LANGUAGE sql STABLE
    RETURN json_build_object(
        'id', r.id,
        'user_id', CASE WHEN r.from_user_id = viewer THEN r.to_user_id ELSE r.from_user_id END,
        'kind', r.type,
        'is_outgoing', r.from_user_id = viewer,
        'status', r.status,
        'request_message', r.request_message,
        'response_message', r.response_message,
        'switches', CASE WHEN r.from_user_id = viewer THEN json_build_object(
            'can_see_online_status', r.can_see_online_status,
            'can_send_messages', r.can_send_messages,
            'can_see_profile', r.can_see_profile,
            'notifications_enabled', r.notifications_enabled
        ) END,
        'created_at', r.created_at,
        'accepted_at', r.accepted_at,
        'user_version', CASE WHEN r.from_user_id = viewer THEN r.from_version ELSE r.to_version END
    );
CREATE OR REPLACE FUNCTION me_json(u "user") RETURNS json LANGUAGE sql STABLE
    RETURN json_build_object(
        'user', json_build_object('id', u.id, 'name', u.name, 'display_name', u.display_name, 'image', u.image,
            'revision', u.face_version),
        'email', u.email,
        'email_verified', u.email_verified,
        'bio', u.bio,
        'location', u.location,
        'website', u.website,
        'status', CASE u.status WHEN 'offline' THEN 'online' ELSE u.status END,
        'custom_status', u.custom_status,
        'custom_status_until', u.custom_status_until,
        'is_private', u.is_private,
        'allow_friend_requests', u.allow_friend_requests,
        'show_online_status', u.show_online_status,
        'allow_adding', u.allow_adding,
        'is_admin', u.is_admin,
        'quiet_from', u.quiet_from,
        'quiet_until', u.quiet_until,
        'time_zone', u.time_zone,
        'feed_seen_at', u.feed_seen_at,
        'created_at', u.created_at,
        'user_version', u.own_version
    );
