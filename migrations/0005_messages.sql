-- Messages: payloads, polls, threads, pins, stars, drafts, scheduled and expiring messages, notifications, search.

ALTER TABLE "user"
    ADD quiet_from time,
    ADD quiet_until time,
    ADD time_zone text NOT NULL DEFAULT 'UTC',
    ADD feed_seen_at timestamptz,
    ADD last_close integer;

ALTER TABLE conversation_participant
    ADD delivered_message_id uuid,
    ADD delivered_version bigint NOT NULL DEFAULT 0,
    ADD delivered_at timestamptz,
    ADD unread_from_id uuid,
    ADD unread_from_version bigint;

-- Before the columns, which change the type that they take; what asks them is made anew below.
DROP FUNCTION message_json(message);
ALTER TABLE message
    DROP delivered_at,
    ADD payload jsonb,
    ADD loud_mentions text[] NOT NULL DEFAULT '{}',
    ADD also_in_conversation boolean NOT NULL DEFAULT false,
    ADD quoted_message_id uuid CONSTRAINT message_quoted_fkey REFERENCES message (id),
    ADD forwarded_from_id uuid,
    ADD forwarded_sender_id uuid CONSTRAINT message_forwarded_sender_fkey REFERENCES "user" (id),
    ADD poll_counts integer[],
    ADD poll_voters integer NOT NULL DEFAULT 0,
    ADD poll_closed_at timestamptz,
    ADD expires_at timestamptz,
    ADD link_preview jsonb;

-- The replies that there are take their places; a reply stood in the conversation as well until now.
UPDATE message m SET thread_order = r.place, also_in_conversation = true
FROM (
    SELECT id, row_number() OVER (PARTITION BY thread_root_id ORDER BY sent_version) AS place
    FROM message WHERE thread_root_id IS NOT NULL
) r WHERE r.id = m.id;
UPDATE message m SET thread_order = r.replies
FROM (SELECT thread_root_id, count(*) AS replies FROM message WHERE thread_root_id IS NOT NULL GROUP BY 1) r
WHERE m.id = r.thread_root_id;

DROP INDEX message_thread_root_idx;
CREATE INDEX message_thread_root_idx ON message (thread_root_id, thread_order) WHERE thread_root_id IS NOT NULL;
CREATE INDEX message_timeline_idx ON message (conversation_id, sent_version)
    WHERE thread_root_id IS NULL OR also_in_conversation;
CREATE INDEX message_pinned_idx ON message (conversation_id, pinned_at) WHERE is_pinned;
CREATE INDEX message_expires_idx ON message (expires_at) WHERE expires_at IS NOT NULL;

ALTER TABLE message_reaction ADD author_id uuid CONSTRAINT message_reaction_author_fkey REFERENCES "user" (id);
UPDATE message_reaction r SET author_id = m.sender_id FROM message m WHERE m.id = r.message_id;
ALTER TABLE message_reaction ALTER author_id SET NOT NULL;
CREATE INDEX message_reaction_author_idx ON message_reaction (author_id, created_at) WHERE NOT is_removed;

CREATE TABLE poll_vote (
    message_id uuid NOT NULL CONSTRAINT poll_vote_message_fkey REFERENCES message (id) ON DELETE CASCADE,
    user_id uuid NOT NULL CONSTRAINT poll_vote_user_fkey REFERENCES "user" (id) ON DELETE CASCADE,
    conversation_id uuid NOT NULL
        CONSTRAINT poll_vote_conversation_fkey REFERENCES conversation (id) ON DELETE CASCADE,
    options integer[] NOT NULL,
    version bigint NOT NULL,
    voted_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT poll_vote_pkey PRIMARY KEY (message_id, user_id)
);
CREATE INDEX poll_vote_version_idx ON poll_vote (conversation_id, version);
CREATE INDEX poll_vote_user_idx ON poll_vote (user_id);

CREATE TABLE thread_follow (
    root_id uuid NOT NULL CONSTRAINT thread_follow_root_fkey REFERENCES message (id) ON DELETE CASCADE,
    user_id uuid NOT NULL CONSTRAINT thread_follow_user_fkey REFERENCES "user" (id) ON DELETE CASCADE,
    conversation_id uuid NOT NULL
        CONSTRAINT thread_follow_conversation_fkey REFERENCES conversation (id) ON DELETE CASCADE,
    is_following boolean NOT NULL DEFAULT true,
    has_replied boolean NOT NULL DEFAULT false,
    last_read_order integer NOT NULL DEFAULT 0,
    user_version bigint NOT NULL DEFAULT 0,
    CONSTRAINT thread_follow_pkey PRIMARY KEY (root_id, user_id)
);
CREATE INDEX thread_follow_user_idx ON thread_follow (user_id, is_following);
CREATE INDEX thread_follow_version_idx ON thread_follow (user_id, user_version) WHERE user_version > 0;

CREATE TABLE message_star (
    user_id uuid NOT NULL CONSTRAINT message_star_user_fkey REFERENCES "user" (id) ON DELETE CASCADE,
    message_id uuid NOT NULL CONSTRAINT message_star_message_fkey REFERENCES message (id) ON DELETE CASCADE,
    conversation_id uuid NOT NULL
        CONSTRAINT message_star_conversation_fkey REFERENCES conversation (id) ON DELETE CASCADE,
    is_removed boolean NOT NULL DEFAULT false,
    user_version bigint NOT NULL,
    starred_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT message_star_pkey PRIMARY KEY (user_id, message_id)
);
CREATE INDEX message_star_user_idx ON message_star (user_id, starred_at) WHERE NOT is_removed;
CREATE INDEX message_star_version_idx ON message_star (user_id, user_version);

CREATE TABLE draft (
    user_id uuid NOT NULL CONSTRAINT draft_user_fkey REFERENCES "user" (id) ON DELETE CASCADE,
    conversation_id uuid NOT NULL
        CONSTRAINT draft_conversation_fkey REFERENCES conversation (id) ON DELETE CASCADE,
    content text NOT NULL CONSTRAINT draft_content_length CHECK (char_length(content) <= 10000),
    user_version bigint NOT NULL,
    updated_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT draft_pkey PRIMARY KEY (user_id, conversation_id)
);

CREATE TABLE scheduled_message (
    id uuid CONSTRAINT scheduled_message_pkey PRIMARY KEY,
    sender_id uuid NOT NULL CONSTRAINT scheduled_message_sender_fkey REFERENCES "user" (id) ON DELETE CASCADE,
    conversation_id uuid NOT NULL
        CONSTRAINT scheduled_message_conversation_fkey REFERENCES conversation (id) ON DELETE CASCADE,
    words jsonb NOT NULL,
    send_at timestamptz NOT NULL,
    status text NOT NULL DEFAULT 'waiting' CONSTRAINT scheduled_message_status_known
        CHECK (status IN ('waiting', 'sent', 'failed', 'cancelled')),
    problem text,
    claimed_at timestamptz,
    user_version bigint NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX scheduled_message_due_idx ON scheduled_message (send_at) WHERE status = 'waiting';
CREATE INDEX scheduled_message_sender_idx ON scheduled_message (sender_id, send_at);

CREATE TABLE push_endpoint (
    id uuid CONSTRAINT push_endpoint_pkey PRIMARY KEY DEFAULT gen_random_uuid(),
    user_id uuid NOT NULL CONSTRAINT push_endpoint_user_fkey REFERENCES "user" (id) ON DELETE CASCADE,
    session_id uuid NOT NULL CONSTRAINT push_endpoint_session_fkey REFERENCES session (id) ON DELETE CASCADE,
    endpoint text NOT NULL CONSTRAINT push_endpoint_key UNIQUE
        CONSTRAINT push_endpoint_length CHECK (char_length(endpoint) BETWEEN 1 AND 2000),
    p256dh text NOT NULL,
    auth text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX push_endpoint_user_idx ON push_endpoint (user_id);
CREATE INDEX push_endpoint_session_idx ON push_endpoint (session_id);

CREATE TABLE message_search (
    message_id uuid CONSTRAINT message_search_pkey PRIMARY KEY,
    conversation_id uuid NOT NULL,
    created_at timestamptz NOT NULL,
    words tsvector NOT NULL
);
CREATE INDEX message_search_words_idx ON message_search USING gin (words);

CREATE FUNCTION silenced(by_whom uuid) RETURNS uuid[] LANGUAGE sql STABLE PARALLEL SAFE
    RETURN ARRAY(
        SELECT r.to_user_id FROM user_relationship r
        WHERE r.from_user_id = by_whom AND r.type IN ('block', 'mute') AND r.status = 'active'
    );

CREATE FUNCTION shows_edits(c conversation, p conversation_participant, sender uuid) RETURNS boolean
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN p.user_id = sender OR CASE coalesce(c.settings ->> 'edits_visible_to', 'everyone')
        WHEN 'everyone' THEN true
        WHEN 'moderators' THEN can(p.role, 'moderator', p.can_delete_messages)
        ELSE false END;

CREATE FUNCTION prefixed(prefix text, words text[]) RETURNS text[] LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN CASE WHEN words = '{}' THEN '{}' ELSE string_to_array(prefix || array_to_string(words, ' ' || prefix), ' ') END;

CREATE FUNCTION search_words(conversation uuid, content text, payload jsonb, mentions uuid[], loud text[], hashtags text[])
    RETURNS tsvector LANGUAGE sql STABLE PARALLEL SAFE
    RETURN to_tsvector(concat_ws(' ', content, payload ->> 'name', payload ->> 'alt', payload -> 'options'))
        || array_to_tsvector(ARRAY['c:' || conversation] || prefixed('m:', mentions::text[]) || prefixed('m:', loud)
            || prefixed('h:', hashtags));

CREATE FUNCTION message_json(m message) RETURNS json LANGUAGE sql STABLE
    RETURN json_build_object(
        'id', m.id,
        'conversation_id', m.conversation_id,
        'sender_id', m.sender_id,
        'content', CASE WHEN m.is_moderated THEN '' ELSE m.content END,
        'content_type', m.content_type,
        'payload', CASE WHEN NOT m.is_moderated THEN m.payload END,
        'formatted_content', CASE WHEN NOT m.is_moderated THEN m.formatted_content END,
        'mentions', CASE WHEN m.is_moderated THEN '{}' ELSE m.mentions END,
        'loud_mentions', CASE WHEN m.is_moderated THEN '{}' ELSE m.loud_mentions END,
        'hashtags', CASE WHEN m.is_moderated THEN '{}' ELSE m.hashtags END,
        'link_preview', CASE WHEN NOT m.is_moderated THEN m.link_preview END,
        'metadata', CASE WHEN NOT m.is_moderated THEN m.metadata END,
        'reactions', m.reactions,
        'parent_message_id', m.parent_message_id,
        'thread_root_id', m.thread_root_id,
        'thread_order', m.thread_order,
        'reply_count', m.reply_count,
        'also_in_conversation', m.also_in_conversation,
        'quoted_message_id', m.quoted_message_id,
        'forwarded_from_id', m.forwarded_from_id,
        'forwarded_sender_id', m.forwarded_sender_id,
        'is_pinned', m.is_pinned,
        'pinned_at', m.pinned_at,
        'pinned_by', m.pinned_by,
        'poll_counts', m.poll_counts,
        'poll_voters', m.poll_voters,
        'poll_closed_at', m.poll_closed_at,
        'expires_at', m.expires_at,
        'edited_at', m.edited_at,
        'is_deleted', m.is_deleted,
        'deleted_at', m.deleted_at,
        'deleted_by', m.deleted_by,
        'system_message_type', m.system_message_type,
        'is_moderated', m.is_moderated,
        'moderation_reason', m.moderation_reason,
        'moderated_at', m.moderated_at,
        'moderated_by', m.moderated_by,
        'sent_version', m.sent_version,
        'version', m.version,
        'created_at', m.created_at
    );

CREATE OR REPLACE FUNCTION preferences_json(p conversation_participant) RETURNS json LANGUAGE sql STABLE
    RETURN json_build_object(
        'pin_order', p.pin_order,
        'is_hidden', p.is_hidden,
        'is_muted', p.is_muted,
        'muted_until', p.muted_until,
        'notification_level', p.notification_level,
        'unread_from_id', p.unread_from_id
    );

CREATE FUNCTION scheduled_json(s scheduled_message) RETURNS json LANGUAGE sql STABLE
    RETURN json_build_object(
        'message_id', s.id,
        'conversation_id', s.conversation_id,
        'words', s.words,
        'send_at', s.send_at,
        'status', s.status,
        'problem', s.problem,
        'created_at', s.created_at
    );

CREATE FUNCTION thread_json(t thread_follow) RETURNS json LANGUAGE sql STABLE
    RETURN json_build_object(
        'conversation_id', t.conversation_id,
        'root_id', t.root_id,
        'is_following', t.is_following,
        'last_read_order', t.last_read_order
    );

CREATE OR REPLACE FUNCTION me_json(u "user") RETURNS json LANGUAGE sql STABLE
    RETURN json_build_object(
        'user', json_build_object('id', u.id, 'name', u.name, 'display_name', u.display_name, 'image', u.image),
        'email', u.email,
        'email_verified', u.email_verified,
        'bio', u.bio,
        'location', u.location,
        'website', u.website,
        'status', u.status,
        'custom_status', u.custom_status,
        'custom_status_until', u.custom_status_until,
        'is_private', u.is_private,
        'allow_friend_requests', u.allow_friend_requests,
        'show_online_status', u.show_online_status,
        'is_admin', u.is_admin,
        'quiet_from', u.quiet_from,
        'quiet_until', u.quiet_until,
        'time_zone', u.time_zone,
        'feed_seen_at', u.feed_seen_at,
        'created_at', u.created_at
    );

CREATE FUNCTION load_rows(table_name text, rows json) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    columns text;
    loaded bigint;
BEGIN
    SELECT string_agg(quote_ident(key), ', ') INTO columns FROM json_object_keys(rows -> 0) AS key;
    EXECUTE format('INSERT INTO %I (%s) SELECT %s FROM json_populate_recordset(NULL::%I, $1) ON CONFLICT DO NOTHING',
        table_name, columns, columns, table_name) USING rows;
    GET DIAGNOSTICS loaded = ROW_COUNT;
    RETURN loaded;
END
$$;
REVOKE EXECUTE ON FUNCTION load_rows(text, json) FROM PUBLIC;

CREATE OR REPLACE FUNCTION traces(needles text[]) RETURNS TABLE (place text, is_said boolean, matches bigint)
    LANGUAGE plpgsql STABLE AS $$
DECLARE
    field record;
BEGIN
    FOR field IN
        SELECT c.table_name, c.column_name FROM information_schema.columns c
        JOIN information_schema.tables t USING (table_schema, table_name)
        WHERE c.table_schema = 'public' AND t.table_type = 'BASE TABLE' AND c.data_type IN ('text', 'jsonb', 'ARRAY')
        ORDER BY 1, 2
    LOOP
        EXECUTE format('SELECT count(*) FROM %I WHERE %I::text ILIKE ANY ($1)', field.table_name, field.column_name)
            INTO matches USING needles;
        IF matches > 0 THEN
            place := field.table_name || '.' || field.column_name;
            is_said := field.table_name IN ('user', 'account') OR place IN ('message.content', 'message.formatted_content', 'message.metadata',
                'message.payload', 'message.link_preview', 'message.hashtags', 'scheduled_message.words', 'draft.content',
                'message_edit.content', 'message_edit.formatted_content', 'conversation.title',
                'conversation.description', 'conversation.settings', 'report.reason');
            RETURN NEXT;
        END IF;
    END LOOP;
END
$$;

CREATE TABLE server_key (
    name text CONSTRAINT server_key_pkey PRIMARY KEY,
    value text NOT NULL
);
INSERT INTO thread_follow (root_id, user_id, conversation_id, has_replied, last_read_order)
SELECT r.root_id, r.user_id, r.conversation_id, bool_or(r.has_replied), max(r.thread_order) FROM (
    SELECT thread_root_id AS root_id, sender_id AS user_id, conversation_id, true AS has_replied, thread_order
    FROM message WHERE thread_root_id IS NOT NULL
    UNION ALL
    SELECT id, sender_id, conversation_id, false, thread_order FROM message WHERE thread_order > 0 AND thread_root_id IS NULL
) r GROUP BY 1, 2, 3;
INSERT INTO message_search (message_id, conversation_id, created_at, words)
SELECT id, conversation_id, created_at, search_words(conversation_id, content, payload, mentions, loud_mentions, hashtags)
FROM message WHERE NOT is_deleted AND NOT is_moderated AND NOT is_system_message;

CREATE FUNCTION are_edits_shown(message uuid) RETURNS boolean LANGUAGE sql STABLE SECURITY DEFINER
    SET search_path = public
    RETURN EXISTS (
        SELECT FROM message m JOIN conversation c ON c.id = m.conversation_id
        JOIN conversation_participant p ON p.conversation_id = c.id AND p.user_id = current_user_id()
        WHERE m.id = are_edits_shown.message AND shows_edits(c, p, m.sender_id)
    );

ALTER TABLE poll_vote ENABLE ROW LEVEL SECURITY;
ALTER TABLE thread_follow ENABLE ROW LEVEL SECURITY;
ALTER TABLE message_star ENABLE ROW LEVEL SECURITY;
ALTER TABLE draft ENABLE ROW LEVEL SECURITY;
ALTER TABLE scheduled_message ENABLE ROW LEVEL SECURITY;
ALTER TABLE push_endpoint ENABLE ROW LEVEL SECURITY;
ALTER TABLE message_search ENABLE ROW LEVEL SECURITY;
ALTER TABLE server_key ENABLE ROW LEVEL SECURITY;
DROP POLICY message_edit_access ON message_edit;
CREATE POLICY message_edit_access ON message_edit FOR SELECT
    USING (EXISTS (SELECT FROM message m WHERE m.id = message_id AND NOT m.is_deleted)
        AND are_edits_shown(message_id));
CREATE POLICY poll_vote_access ON poll_vote FOR SELECT USING (user_id = current_user_id() OR EXISTS (
    SELECT FROM message m WHERE m.id = message_id AND NOT coalesce((m.payload ->> 'is_anonymous')::boolean, false)
));
CREATE POLICY thread_follow_access ON thread_follow FOR SELECT USING (user_id = current_user_id());
CREATE POLICY message_star_access ON message_star FOR SELECT USING (user_id = current_user_id());
CREATE POLICY draft_access ON draft FOR SELECT USING (user_id = current_user_id());
CREATE POLICY scheduled_message_access ON scheduled_message FOR SELECT USING (sender_id = current_user_id());
REVOKE EXECUTE ON FUNCTION are_edits_shown(uuid), silenced(uuid) FROM PUBLIC;

CREATE OR REPLACE FUNCTION grant_reader(role_name text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('GRANT SELECT (id, name, display_name, image, erased_at) ON "user" TO %I', role_name);
    EXECUTE format('GRANT SELECT (id, user_id, expires_at, ip_address, user_agent, created_at) ON session TO %I',
        role_name);
    EXECUTE format('GRANT SELECT (id, title, description, type, image, is_public, max_participants, is_archived,
        created_by, last_message_at, last_activity_at, message_count, participant_count, settings, version,
        settings_version, created_at, updated_at) ON conversation TO %I', role_name);
    EXECUTE format('GRANT SELECT (id, conversation_id, user_id, role, status, can_add_members, can_remove_members,
        can_edit_conversation, can_delete_messages, can_pin_messages, joined_at, left_at, invited_by, version)
        ON conversation_participant TO %I', role_name);
    EXECUTE format('GRANT SELECT ON message, message_reaction, message_edit, poll_vote, thread_follow, message_star,
        draft, scheduled_message, user_relationship, report, audit_entry, user_profile TO %I', role_name);
    EXECUTE format('GRANT SELECT (id, message_id, uploaded_by, filename, original_filename, mime_type, file_size,
        metadata, is_deleted, created_at, updated_at) ON attachment TO %I', role_name);
    EXECUTE format('GRANT EXECUTE ON FUNCTION may_i(text, uuid), is_participant(uuid), is_allowed(uuid, text, text),
        is_visible(uuid, bigint), are_edits_shown(uuid) TO %I', role_name);
END
$$;
