-- What runs as the owner resolves no name in a reader's pg_temp; readers can make nothing; votes in deleted polls are gone.

ALTER FUNCTION may_i(text, uuid) SET search_path = pg_catalog, public, pg_temp;
ALTER FUNCTION is_participant(uuid) SET search_path = pg_catalog, public, pg_temp;
ALTER FUNCTION is_visible(uuid, bigint) SET search_path = pg_catalog, public, pg_temp;
ALTER FUNCTION are_edits_shown(uuid) SET search_path = pg_catalog, public, pg_temp;

CREATE OR REPLACE FUNCTION is_allowed(conversation uuid, needed text, permission text) RETURNS boolean
    LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp
    RETURN EXISTS (
        SELECT FROM conversation_participant p JOIN conversation c ON c.id = p.conversation_id AND NOT c.is_deleted
        WHERE p.conversation_id = is_allowed.conversation AND p.user_id = current_user_id() AND p.status = 'active'
            AND can(p.role, needed, CASE permission
                WHEN 'can_delete_messages' THEN p.can_delete_messages
                WHEN 'can_remove_members' THEN p.can_remove_members
                ELSE false END)
    );

CREATE OR REPLACE FUNCTION may(action text, viewer uuid, target uuid) RETURNS boolean LANGUAGE plpgsql STABLE AS $$
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
    INTO them FROM public."user" u WHERE u.id = may.target;
    IF NOT FOUND OR viewer IS NULL THEN
        RETURN false;
    ELSIF them.erased_at IS NOT NULL OR NOT them.is_here THEN
        -- What they said stays, and needs a name; without them, that is all.
        RETURN action = 'see_face' AND (them.erased_at IS NOT NULL OR public.are_together(viewer, target));
    END IF;
    SELECT coalesce(bool_or(r.type = 'block' AND r.status = 'active'), false) AS blocks,
        coalesce(bool_or(r.type = 'friend' AND r.status = 'accepted'), false) AS is_friend,
        coalesce(bool_and(r.can_see_online_status), true) AS presence,
        coalesce(bool_and(r.can_see_profile), true) AS profile,
        coalesce(bool_and(r.can_send_messages), true) AS messages
    INTO theirs FROM public.user_relationship r WHERE r.from_user_id = may.target AND r.to_user_id = may.viewer;
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
        SELECT FROM public.user_relationship r
        WHERE r.from_user_id = may.viewer AND r.to_user_id = may.target AND r.type = 'block' AND r.status = 'active'
    ) THEN
        RETURN false;
    END IF;
    IF NOT them.is_private OR theirs.is_friend OR action = 'request_friend' THEN
        RETURN true;
    END IF;
    RETURN action NOT IN ('see_profile', 'follow') AND public.are_together(viewer, target);
END
$$;

CREATE OR REPLACE FUNCTION may_now(action text, viewer uuid, target uuid) RETURNS boolean LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    RETURN public.may(action, viewer, target);
END
$$;

CREATE OR REPLACE FUNCTION are_together(one uuid, other uuid) RETURNS boolean LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN EXISTS (
        SELECT FROM public.conversation_participant mine
        JOIN public.conversation_participant theirs ON theirs.conversation_id = mine.conversation_id
            AND theirs.user_id = are_together.other AND theirs.status = 'active'
        JOIN public.conversation c ON c.id = mine.conversation_id AND NOT c.is_deleted
        WHERE mine.user_id = are_together.one AND mine.status = 'active'
    );
END
$$;

CREATE OR REPLACE FUNCTION traces(needles text[]) RETURNS TABLE (place text, is_said boolean, matches bigint)
    LANGUAGE plpgsql STABLE SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    field record;
BEGIN
    FOR field IN
        SELECT c.table_name, c.column_name FROM information_schema.columns c
        JOIN information_schema.tables t USING (table_schema, table_name)
        WHERE c.table_schema = 'public' AND t.table_type = 'BASE TABLE' AND c.data_type IN ('text', 'jsonb', 'ARRAY')
        ORDER BY 1, 2
    LOOP
        EXECUTE format('SELECT count(*) FROM public.%I WHERE %I::text ILIKE ANY ($1)', field.table_name, field.column_name)
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

CREATE OR REPLACE FUNCTION load_rows(table_name text, rows json) RETURNS bigint
    LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    columns text;
    loaded bigint;
BEGIN
    SELECT string_agg(quote_ident(key), ', ') INTO columns FROM json_object_keys(rows -> 0) AS key;
    EXECUTE format('INSERT INTO public.%I (%s) SELECT %s FROM json_populate_recordset(NULL::public.%I, $1) ON CONFLICT DO NOTHING',
        table_name, columns, columns, table_name) USING rows;
    GET DIAGNOSTICS loaded = ROW_COUNT;
    RETURN loaded;
END
$$;

DROP POLICY poll_vote_access ON poll_vote;
CREATE POLICY poll_vote_access ON poll_vote FOR SELECT USING (options <> '{}' AND EXISTS (
    SELECT FROM message m WHERE m.id = message_id AND NOT m.is_deleted AND NOT m.is_moderated AND m.payload IS NOT NULL
        AND (user_id = current_user_id() OR NOT coalesce((m.payload ->> 'is_anonymous')::boolean, false))
));

CREATE FUNCTION close_to_public() RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    IF EXISTS (
        SELECT FROM pg_database d CROSS JOIN aclexplode(coalesce(d.datacl, acldefault('d', d.datdba))) a
        WHERE d.datname = current_database() AND a.grantee = 0 AND a.privilege_type = 'TEMPORARY'
    ) THEN
        EXECUTE format('REVOKE TEMPORARY ON DATABASE %I FROM PUBLIC', current_database());
    END IF;
    IF EXISTS (
        SELECT FROM pg_namespace n CROSS JOIN aclexplode(coalesce(n.nspacl, acldefault('n', n.nspowner))) a
        WHERE n.nspname = 'public' AND a.grantee = 0 AND a.privilege_type = 'CREATE'
    ) THEN
        REVOKE CREATE ON SCHEMA public FROM PUBLIC;
    END IF;
EXCEPTION WHEN insufficient_privilege THEN
    RAISE WARNING 'the owner of the database must REVOKE TEMPORARY on it, and CREATE on the schema public, FROM PUBLIC';
END
$$;
REVOKE EXECUTE ON FUNCTION close_to_public() FROM PUBLIC;

CREATE OR REPLACE FUNCTION grant_reader(role_name text) RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    PERFORM close_to_public();
    IF EXISTS (
        SELECT FROM pg_roles r WHERE r.rolname = role_name AND (r.rolsuper OR r.rolbypassrls
            OR pg_has_role(r.oid, (SELECT c.relowner FROM pg_class c WHERE c.oid = '"user"'::regclass), 'MEMBER')
            OR has_schema_privilege(r.oid, 'public', 'CREATE'))
    ) THEN
        RAISE EXCEPTION 'the role % is not held by policies, or may create objects in the schema public', role_name
            USING ERRCODE = 'insufficient_privilege', HINT = 'Make a role without these rights for whoever reads.';
    END IF;
    EXECUTE format('REVOKE ALL ON ALL TABLES IN SCHEMA public FROM %I', role_name);
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
        draft, scheduled_message, report, audit_entry, user_profile TO %I', role_name);
    -- Not the switches: what somebody has set about others is theirs alone.
    EXECUTE format('GRANT SELECT (id, from_user_id, to_user_id, type, status, request_message, response_message,
        created_at, accepted_at) ON user_relationship TO %I', role_name);
    EXECUTE format('GRANT SELECT (id, message_id, uploaded_by, filename, original_filename, mime_type, file_size,
        metadata, is_deleted, created_at, updated_at) ON attachment TO %I', role_name);
    EXECUTE format('GRANT EXECUTE ON FUNCTION may_i(text, uuid), is_participant(uuid), is_allowed(uuid, text, text),
        is_visible(uuid, bigint), are_edits_shown(uuid) TO %I', role_name);
END
$$;

-- Those who could read so far, by the new grants.
DO $$
DECLARE
    reader record;
BEGIN
    FOR reader IN
        SELECT DISTINCT r.rolname FROM pg_class c CROSS JOIN aclexplode(c.relacl) a JOIN pg_roles r ON r.oid = a.grantee
        WHERE c.oid = 'user_profile'::regclass AND a.grantee <> c.relowner
    LOOP
        BEGIN
            PERFORM grant_reader(reader.rolname);
        EXCEPTION WHEN insufficient_privilege THEN
            RAISE WARNING '% keeps its grants: %', reader.rolname, SQLERRM;
        END;
    END LOOP;
END
$$;
