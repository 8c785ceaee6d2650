-- People: invitations, preferences, privacy, moderation, the audit log, and rules for whoever reads directly.

ALTER TABLE "user"
    ADD own_version bigint NOT NULL DEFAULT 0,
    ADD custom_status_until timestamptz,
    ADD is_disabled boolean NOT NULL DEFAULT false,
    ADD is_admin boolean NOT NULL DEFAULT false,
    ADD erased_at timestamptz;
CREATE INDEX user_search_idx ON "user" USING gin (to_tsvector('simple', name || ' ' || coalesce(display_name, '')));
CREATE INDEX user_custom_status_until_idx ON "user" (custom_status_until) WHERE custom_status_until IS NOT NULL;
CREATE INDEX user_to_erase_idx ON "user" (deleted_at) WHERE is_deleted AND erased_at IS NULL;

ALTER TABLE conversation
    ADD image text CONSTRAINT conversation_image_length CHECK (char_length(image) BETWEEN 1 AND 2000),
    ADD invite_expires_at timestamptz,
    ADD invite_uses_left integer CONSTRAINT conversation_invite_uses_left_range CHECK (invite_uses_left >= 0);
CREATE INDEX conversation_search_idx ON conversation
    USING gin (to_tsvector('simple', coalesce(title, '') || ' ' || coalesce(description, ''))) WHERE is_public;
-- Settings have a type now; what clients kept there is theirs still.
UPDATE conversation SET settings = jsonb_build_object('custom', settings) WHERE settings <> '{}';
UPDATE conversation c SET is_active = false WHERE type IN ('group', 'channel') AND NOT EXISTS (
    SELECT FROM conversation_participant p WHERE p.conversation_id = c.id AND p.status = 'active'
);

ALTER TABLE conversation_participant
    ADD joined_version bigint NOT NULL DEFAULT 0,
    ADD user_version bigint NOT NULL DEFAULT 0,
    ADD pin_order integer,
    ADD is_hidden boolean NOT NULL DEFAULT false,
    ADD notification_level text NOT NULL DEFAULT 'all' CONSTRAINT conversation_participant_notification_level_known
        CHECK (notification_level IN ('all', 'mentions', 'none')),
    ADD last_sent_at timestamptz,
    DROP CONSTRAINT conversation_participant_status_known,
    ADD CONSTRAINT conversation_participant_status_known
        CHECK (status IN ('active', 'invited', 'declined', 'left', 'removed', 'banned'));

DROP INDEX message_sender_idx;
CREATE INDEX message_sender_idx ON message (sender_id, id);
CREATE INDEX message_reaction_user_idx ON message_reaction (user_id);

ALTER TABLE user_relationship
    DROP last_interaction_at,
    DROP interaction_count,
    ADD from_version bigint NOT NULL DEFAULT 0,
    ADD to_version bigint NOT NULL DEFAULT 0;

-- ------------------------------------------------------------------------------------------- moderation

-- One for each message and reporter: said again, it is the same report.
CREATE TABLE report (
    id uuid CONSTRAINT report_pkey PRIMARY KEY DEFAULT gen_random_uuid(),
    conversation_id uuid NOT NULL
        CONSTRAINT report_conversation_fkey REFERENCES conversation (id) ON DELETE CASCADE,
    message_id uuid NOT NULL CONSTRAINT report_message_fkey REFERENCES message (id) ON DELETE CASCADE,
    reporter_id uuid NOT NULL CONSTRAINT report_reporter_fkey REFERENCES "user" (id),
    reason text NOT NULL CONSTRAINT report_reason_length CHECK (char_length(reason) BETWEEN 1 AND 500),
    status text NOT NULL DEFAULT 'open'
        CONSTRAINT report_status_known CHECK (status IN ('open', 'upheld', 'dismissed')),
    resolved_by uuid CONSTRAINT report_resolved_by_fkey REFERENCES "user" (id),
    resolved_at timestamptz,
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT report_key UNIQUE (message_id, reporter_id)
);
CREATE INDEX report_conversation_idx ON report (conversation_id, status, id);
CREATE INDEX report_open_idx ON report (id) WHERE status = 'open';

-- Who used what power on whom. Each chain, one for each conversation and one (of zeros) for the server, is numbered
-- without holes, and each entry carries the hash of the one before: see audit_hash().
CREATE TABLE audit_entry (
    chain uuid NOT NULL,
    number bigint NOT NULL,
    -- Null: the command line.
    actor_id uuid CONSTRAINT audit_entry_actor_fkey REFERENCES "user" (id),
    action text NOT NULL CONSTRAINT audit_entry_action_length CHECK (char_length(action) BETWEEN 1 AND 50),
    user_id uuid,
    message_id uuid,
    details jsonb NOT NULL DEFAULT '{}',
    created_at timestamptz NOT NULL DEFAULT now(),
    previous_hash bytea NOT NULL,
    hash bytea NOT NULL,
    CONSTRAINT audit_entry_pkey PRIMARY KEY (chain, number)
);


-- --------------------------------------------------------------------------------------------- rules and forms

-- The messages that a participant may see are those sent after this version.
CREATE FUNCTION visible_after(c conversation, p conversation_participant) RETURNS bigint
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN CASE WHEN c.settings ->> 'history' = 'from_joining' THEN p.joined_version ELSE 0 END;

-- Whether a participant may send now: not while it is archived, below the role that the settings ask for, and in slow
-- mode, which moderators are free of, only with `has_waited`, which whoever made sure of it says.
CREATE FUNCTION may_send(c conversation, role text, has_waited boolean) RETURNS boolean
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN NOT c.is_archived AND (c.settings = '{}' OR (
        role_rank(role) >= role_rank(coalesce(c.settings ->> 'send_role', 'guest'))
        AND (NOT c.settings ? 'slow_mode_seconds' OR has_waited OR role_rank(role) >= role_rank('moderator'))
    ));

-- A row as it goes over the wire (protocol/values.py has the same fields). What a moderator has hidden is hidden here,
-- for everyone; whoever may see it all the same gets it beside the message.
CREATE OR REPLACE FUNCTION message_json(m message) RETURNS json LANGUAGE sql STABLE
    RETURN json_build_object(
        'id', m.id,
        'conversation_id', m.conversation_id,
        'sender_id', m.sender_id,
        'content', CASE WHEN m.is_moderated THEN '' ELSE m.content END,
        'content_type', m.content_type,
        'formatted_content', CASE WHEN NOT m.is_moderated THEN m.formatted_content END,
        'mentions', CASE WHEN m.is_moderated THEN '{}' ELSE m.mentions END,
        'metadata', CASE WHEN NOT m.is_moderated THEN m.metadata END,
        'reactions', m.reactions,
        'parent_message_id', m.parent_message_id,
        'thread_root_id', m.thread_root_id,
        'reply_count', m.reply_count,
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

CREATE OR REPLACE FUNCTION conversation_json(c conversation) RETURNS json LANGUAGE sql STABLE
    RETURN json_build_object(
        'id', c.id,
        'type', c.type,
        'title', c.title,
        'description', c.description,
        'image', c.image,
        'is_public', c.is_public,
        'max_participants', c.max_participants,
        'is_archived', c.is_archived,
        'is_deleted', c.is_deleted,
        'created_by', c.created_by,
        'participant_count', c.participant_count,
        'settings', c.settings,
        'version', c.settings_version,
        'created_at', c.created_at
    );

CREATE OR REPLACE FUNCTION participant_json(p conversation_participant) RETURNS json LANGUAGE sql STABLE
    RETURN json_build_object(
        'conversation_id', p.conversation_id,
        'user_id', p.user_id,
        'role', p.role,
        'status', p.status,
        'permissions', json_build_object(
            'can_add_members', can(p.role, 'admin', p.can_add_members),
            'can_remove_members', can(p.role, 'admin', p.can_remove_members),
            'can_edit_conversation', can(p.role, 'admin', p.can_edit_conversation),
            'can_delete_messages', can(p.role, 'moderator', p.can_delete_messages),
            'can_pin_messages', can(p.role, 'moderator', p.can_pin_messages)
        ),
        'joined_at', p.joined_at,
        'left_at', p.left_at,
        'invited_by', p.invited_by,
        'version', p.version
    );

CREATE FUNCTION preferences_json(p conversation_participant) RETURNS json LANGUAGE sql STABLE
    RETURN json_build_object(
        'pin_order', p.pin_order,
        'is_hidden', p.is_hidden,
        'is_muted', p.is_muted,
        'muted_until', p.muted_until,
        'notification_level', p.notification_level
    );

CREATE FUNCTION invitation_json(p conversation_participant, c conversation) RETURNS json LANGUAGE sql STABLE
    RETURN json_build_object(
        'conversation_id', c.id,
        'type', c.type,
        'title', c.title,
        'description', c.description,
        'image', c.image,
        'participant_count', c.participant_count,
        'role', p.role,
        'invited_by', p.invited_by
    );

-- As one of the two sees it.
CREATE FUNCTION relationship_json(r user_relationship, viewer uuid) RETURNS json LANGUAGE sql STABLE
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
        'accepted_at', r.accepted_at
    );

CREATE FUNCTION me_json(u "user") RETURNS json LANGUAGE sql STABLE
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
        'created_at', u.created_at
    );

-- What makes an entry of the audit log stand where it stands and say what it says.
CREATE FUNCTION audit_hash(e audit_entry) RETURNS bytea LANGUAGE sql STABLE
    RETURN sha256(convert_to(jsonb_build_array(
        e.chain, e.number, e.actor_id, e.action, e.user_id, e.message_id, e.details,
        extract(epoch FROM e.created_at), encode(e.previous_hash, 'hex')
    )::text, 'UTF8'));

-- The one table of who may see or do what to whom (protocol/privacy.py has it in words; a test compares all cells).
-- It asks what is cheap first: most people are neither private nor blocked.
CREATE FUNCTION may(action text, viewer uuid, target uuid) RETURNS boolean LANGUAGE plpgsql STABLE AS $$
#variable_conflict use_column
DECLARE
    them record;
    theirs record;
BEGIN
    IF viewer = target THEN
        RETURN action IN ('see_face', 'see_profile', 'see_presence');
    END IF;
    SELECT u.is_active AND NOT u.is_deleted AS is_here, u.erased_at, u.is_private, u.allow_friend_requests,
        u.show_online_status
    INTO them FROM "user" u WHERE u.id = may.target;
    IF NOT FOUND OR viewer IS NULL THEN
        RETURN false;
    ELSIF them.erased_at IS NOT NULL OR NOT them.is_here THEN
        -- What they said stays, and needs a name; without them, that is all.
        RETURN action = 'see_face' AND (them.erased_at IS NOT NULL OR are_together(viewer, target));
    END IF;
    SELECT coalesce(bool_or(r.type = 'block' AND r.status = 'active'), false) AS blocks,
        coalesce(bool_or(r.type = 'friend' AND r.status = 'accepted'), false) AS is_friend,
        coalesce(bool_and(r.can_see_online_status), true) AS presence,
        coalesce(bool_and(r.can_see_profile), true) AS profile,
        coalesce(bool_and(r.can_send_messages), true) AS messages
    INTO theirs FROM user_relationship r WHERE r.from_user_id = may.target AND r.to_user_id = may.viewer;
    IF theirs.blocks
        OR (action = 'see_presence' AND NOT (them.show_online_status AND theirs.presence))
        OR (action = 'see_profile' AND NOT theirs.profile)
        OR (action IN ('write', 'invite') AND NOT theirs.messages)
        OR (action = 'request_friend' AND NOT them.allow_friend_requests)
    THEN
        RETURN false;
    ELSIF action IN ('see_face', 'see_profile') THEN
        NULL;
    ELSIF EXISTS (
        SELECT FROM user_relationship r
        WHERE r.from_user_id = may.viewer AND r.to_user_id = may.target AND r.type = 'block' AND r.status = 'active'
    ) THEN
        RETURN false;
    END IF;
    IF NOT them.is_private OR theirs.is_friend OR action = 'request_friend' THEN
        RETURN true;
    END IF;
    RETURN action NOT IN ('see_profile', 'follow') AND are_together(viewer, target);
END
$$;

-- Whether two users take part in the same conversation.
CREATE FUNCTION are_together(one uuid, other uuid) RETURNS boolean LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN EXISTS (
        SELECT FROM conversation_participant mine
        JOIN conversation_participant theirs ON theirs.conversation_id = mine.conversation_id
            AND theirs.user_id = are_together.other AND theirs.status = 'active'
        JOIN conversation c ON c.id = mine.conversation_id AND NOT c.is_deleted
        WHERE mine.user_id = are_together.one AND mine.status = 'active'
    );
END
$$;

-- Where any of these texts is left, in whichever table: what `openchat erase --verify` looks at. What people said and
-- called things, and what other people are called, is counted apart: that it reads the same proves nothing.
CREATE FUNCTION traces(needles text[]) RETURNS TABLE (place text, is_said boolean, matches bigint)
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
                'message_edit.content', 'message_edit.formatted_content', 'conversation.title',
                'conversation.description', 'conversation.settings', 'report.reason');
            RETURN NEXT;
        END IF;
    END LOOP;
END
$$;
REVOKE EXECUTE ON FUNCTION traces(text[]) FROM PUBLIC;


-- --------------------------------------------------------------------------------------- row-level security

DROP POLICY user_access ON "user";
DROP POLICY conversation_access ON conversation;
DROP POLICY conversation_participant_access ON conversation_participant;
DROP POLICY message_access ON message;
DROP POLICY message_reaction_access ON message_reaction;
DROP POLICY message_edit_access ON message_edit;
DROP POLICY attachment_access ON attachment;
DROP POLICY user_relationship_access ON user_relationship;
DROP POLICY session_access ON session;

-- What policies ask, as the owner: a policy on conversation_participant would ask itself. Each is about the reader,
-- so that none tells what stands between others.
CREATE FUNCTION may_i(action text, target uuid) RETURNS boolean LANGUAGE sql STABLE SECURITY DEFINER
    SET search_path = public
    RETURN may(action, current_user_id(), target);

CREATE OR REPLACE FUNCTION is_participant(conversation uuid) RETURNS boolean LANGUAGE sql STABLE SECURITY DEFINER
    SET search_path = public
    RETURN EXISTS (
        SELECT FROM conversation_participant p JOIN conversation c ON c.id = p.conversation_id AND NOT c.is_deleted
        WHERE p.conversation_id = is_participant.conversation AND p.user_id = current_user_id()
            AND p.status = 'active'
    );

-- Whether the reader has the permission `needed` in a conversation, by role or by a grant of that name.
CREATE FUNCTION is_allowed(conversation uuid, needed text, permission text) RETURNS boolean
    LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public
    RETURN EXISTS (
        SELECT FROM conversation_participant p JOIN conversation c ON c.id = p.conversation_id AND NOT c.is_deleted
        WHERE p.conversation_id = is_allowed.conversation AND p.user_id = current_user_id() AND p.status = 'active'
            AND can(p.role, needed, coalesce((to_jsonb(p) ->> permission)::boolean, false))
    );

CREATE FUNCTION is_visible(conversation uuid, sent_version bigint) RETURNS boolean
    LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public
    RETURN EXISTS (
        SELECT FROM conversation_participant p JOIN conversation c ON c.id = p.conversation_id AND NOT c.is_deleted
        WHERE p.conversation_id = is_visible.conversation AND p.user_id = current_user_id() AND p.status = 'active'
            AND is_visible.sent_version > visible_after(c, p)
    );

ALTER TABLE report ENABLE ROW LEVEL SECURITY;
ALTER TABLE audit_entry ENABLE ROW LEVEL SECURITY;

CREATE POLICY user_access ON "user" FOR SELECT USING (may_i('see_face', id));
CREATE POLICY session_access ON session FOR SELECT USING (user_id = current_user_id());
CREATE POLICY conversation_access ON conversation FOR SELECT USING (is_participant(id));
CREATE POLICY conversation_participant_access ON conversation_participant FOR SELECT USING (
    is_participant(conversation_id) AND (status = 'active' OR user_id = current_user_id()
        OR is_allowed(conversation_id, 'admin', 'can_remove_members'))
);
CREATE POLICY message_access ON message FOR SELECT USING (
    is_visible(conversation_id, sent_version) AND (NOT is_moderated OR sender_id = current_user_id()
        OR is_allowed(conversation_id, 'moderator', 'can_delete_messages'))
);
-- These ask for the message, whose own policy is asked in turn.
CREATE POLICY message_reaction_access ON message_reaction FOR SELECT
    USING (EXISTS (SELECT FROM message m WHERE m.id = message_id));
CREATE POLICY message_edit_access ON message_edit FOR SELECT
    USING (EXISTS (SELECT FROM message m WHERE m.id = message_id AND NOT m.is_deleted));
CREATE POLICY attachment_access ON attachment FOR SELECT
    USING (EXISTS (SELECT FROM message m WHERE m.id = message_id AND NOT m.is_deleted));
-- Nobody learns who blocked or muted them.
CREATE POLICY user_relationship_access ON user_relationship FOR SELECT USING (
    from_user_id = current_user_id() OR (to_user_id = current_user_id() AND type IN ('friend', 'follow'))
);
CREATE POLICY report_access ON report FOR SELECT
    USING (is_allowed(conversation_id, 'moderator', 'can_delete_messages'));
CREATE POLICY audit_entry_access ON audit_entry FOR SELECT USING (is_allowed(chain, 'admin', ''));

-- What is not everyone's who may see a user's face: the policies are about rows, this is about columns.
CREATE VIEW user_profile WITH (security_barrier) AS
    SELECT id, bio, location, website, created_at FROM "user" WHERE may_i('see_profile', id);

-- A function may be run by anyone unless told otherwise.
REVOKE EXECUTE ON FUNCTION may(text, uuid, uuid), are_together(uuid, uuid), may_i(text, uuid), is_participant(uuid),
    is_allowed(uuid, text, text), is_visible(uuid, bigint) FROM PUBLIC;

CREATE FUNCTION grant_reader(role_name text) RETURNS void LANGUAGE plpgsql AS $$
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
    EXECUTE format('GRANT SELECT ON message, message_reaction, message_edit, user_relationship, report, audit_entry,
        user_profile TO %I', role_name);
    EXECUTE format('GRANT SELECT (id, message_id, uploaded_by, filename, original_filename, mime_type, file_size,
        metadata, is_deleted, created_at, updated_at) ON attachment TO %I', role_name);
    EXECUTE format('GRANT EXECUTE ON FUNCTION may_i(text, uuid), is_participant(uuid), is_allowed(uuid, text, text),
        is_visible(uuid, bigint) TO %I', role_name);
END
$$;
REVOKE EXECUTE ON FUNCTION grant_reader(text) FROM PUBLIC;
