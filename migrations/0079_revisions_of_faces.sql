-- A constant default rewrites no rows.
ALTER TABLE "user" ADD COLUMN face_version bigint NOT NULL DEFAULT 0;
ALTER TABLE "user" ALTER COLUMN face_version SET STATISTICS 0;
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
        'created_at', u.created_at
    );
