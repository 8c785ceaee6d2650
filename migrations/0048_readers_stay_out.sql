-- Readers stay out of other databases and out of the server's log, and see no counts of messages that are hidden.
-- The other databases of the cluster that everybody may connect to. All of them have one table of locks, and none of these
-- is closed as this one is: from there, a reader stops the server (docs/decisions/0045-what-readers-hold.md).
CREATE FUNCTION open_databases() RETURNS SETOF text LANGUAGE sql STABLE SET search_path = pg_catalog, public, pg_temp
BEGIN ATOMIC
    SELECT d.datname::text FROM pg_database d CROSS JOIN aclexplode(coalesce(d.datacl, acldefault('d', d.datdba))) a
    WHERE d.datallowconn AND d.datname <> current_database() AND a.grantee = 0 AND a.privilege_type = 'CONNECT'
    ORDER BY d.datname;
END;
REVOKE EXECUTE ON FUNCTION open_databases() FROM PUBLIC;

CREATE OR REPLACE FUNCTION close_functions_to_public() RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    found record;
BEGIN
    FOR found IN
        SELECT 'EXECUTE' AS privilege, format('FUNCTION %s', p.oid::regprocedure) AS name,
            pg_has_role(p.proowner, 'USAGE') AS is_mine
        FROM pg_proc p CROSS JOIN aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
        WHERE p.pronamespace = 'pg_catalog'::regnamespace AND a.grantee = 0 AND a.privilege_type = 'EXECUTE'
            AND (p.proname ~ '^pg_(try_)?advisory_(xact_)?lock' OR p.proname IN ('lo_creat', 'lo_create', 'lo_from_bytea',
                'lo_put', 'lowrite', 'lo_truncate', 'lo_truncate64', 'pg_logical_emit_message', 'pg_export_snapshot',
                'pg_current_xact_id', 'txid_current'))
        UNION ALL
        SELECT 'USAGE', format('LANGUAGE %I', l.lanname), pg_has_role(l.lanowner, 'USAGE')
        FROM pg_language l CROSS JOIN aclexplode(coalesce(l.lanacl, acldefault('l', l.lanowner))) a
        WHERE l.lanispl AND l.lanpltrusted AND a.grantee = 0
    LOOP
        IF NOT found.is_mine THEN
            RAISE WARNING 'advisory locks, large objects, WAL and DO stay open to everybody: a superuser must call'
                ' close_functions_to_public()';
            RETURN;
        END IF;
        IF found.privilege = 'USAGE' THEN
            EXECUTE format('GRANT USAGE ON %s TO %I', found.name,
                (SELECT c.relowner::regrole::name FROM pg_class c WHERE c.oid = '"user"'::regclass));
        END IF;
        EXECUTE format('REVOKE %s ON %s FROM PUBLIC', found.privilege, found.name);
    END LOOP;
END
$$;

CREATE OR REPLACE FUNCTION bound_reader(role_name text) RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    bound record;
BEGIN
    IF (SELECT r.rolconnlimit FROM pg_roles r WHERE r.rolname = role_name) < 0 THEN
        BEGIN
            EXECUTE format('ALTER ROLE %I CONNECTION LIMIT 10', role_name);
        EXCEPTION WHEN insufficient_privilege THEN
            RAISE WARNING 'an administrator must ALTER ROLE % CONNECTION LIMIT 10', quote_ident(role_name);
        END;
    END IF;
    FOR bound IN
        SELECT b.name, b.value FROM (VALUES ('statement_timeout', '5min'), ('idle_in_transaction_session_timeout', '1min'),
            ('temp_file_limit', '1GB'), ('log_min_messages', 'fatal')) b (name, value)
        WHERE NOT EXISTS (
            SELECT FROM pg_db_role_setting s JOIN pg_roles r ON r.oid = s.setrole CROSS JOIN unnest(s.setconfig) c
            WHERE r.rolname = role_name AND s.setdatabase IN (0, (SELECT d.oid FROM pg_database d
                WHERE d.datname = current_database())) AND c LIKE b.name || '=%'
        )
    LOOP
        BEGIN
            EXECUTE format('ALTER ROLE %I SET %s = %L', role_name, bound.name, bound.value);
        EXCEPTION WHEN insufficient_privilege THEN
            RAISE WARNING 'an administrator must ALTER ROLE % SET % = %', quote_ident(role_name), bound.name,
                quote_literal(bound.value);
        END;
    END LOOP;
END
$$;

CREATE OR REPLACE FUNCTION grant_reader(role_name text) RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    open_ones text := (SELECT string_agg(quote_ident(o.name), ', ') FROM open_databases() o (name));
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
    PERFORM close_functions_to_public();
    PERFORM keep_no_statistics();
    PERFORM bound_reader(role_name);
    IF open_ones IS NOT NULL THEN
        -- Not done here: other users of the cluster may need to connect there.
        RAISE WARNING 'a reader can fill the locks of all databases from those that everybody may connect to. If nothing'
            ' else needs that: REVOKE CONNECT ON DATABASE % FROM PUBLIC', open_ones;
    END IF;
    EXECUTE format('REVOKE ALL ON ALL TABLES IN SCHEMA public FROM %I', role_name);
    EXECUTE format('GRANT SELECT (id, name, display_name, image) ON "user" TO %I', role_name);
    EXECUTE format('GRANT SELECT (id, user_id, expires_at, ip_address, user_agent, created_at) ON session TO %I',
        role_name);
    -- Not message_count nor last_message_at: they tell a newcomer of messages of before.
    EXECUTE format('GRANT SELECT (id, title, description, type, image, is_public, max_participants, is_archived,
        created_by, last_activity_at, participant_count, settings, version, settings_version, created_at)
        ON conversation TO %I', role_name);
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
        is_visible(uuid, bigint), are_edits_shown(uuid), is_message_shown(uuid, bigint, boolean, uuid),
        is_part_shown(uuid, boolean), is_vote_shown(uuid, uuid, integer[]), is_membership_shown(uuid, uuid, text),
        is_relationship_shown(uuid, uuid, text), is_mine(uuid), is_past_shown(uuid, uuid),
        is_report_shown(uuid, uuid), is_entry_shown(uuid, uuid) TO %I', role_name);
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
