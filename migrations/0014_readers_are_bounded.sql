-- Readers of the database could fill the table of locks with advisory locks, and the disk with large objects.

-- Takes from everybody the functions of PostgreSQL by which any role fills what all share: the table of locks, and the disk.
-- Only a superuser can. These rights are copied with a template and are in a dump.
CREATE FUNCTION close_functions_to_public() RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    found record;
BEGIN
    FOR found IN
        SELECT p.oid::regprocedure AS name, pg_has_role(p.proowner, 'USAGE') AS is_mine
        FROM pg_proc p CROSS JOIN aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
        WHERE p.pronamespace = 'pg_catalog'::regnamespace AND a.grantee = 0 AND a.privilege_type = 'EXECUTE'
            AND (p.proname ~ '^pg_(try_)?advisory_(xact_)?lock' OR p.proname IN ('lo_creat', 'lo_create', 'lo_from_bytea',
                'lo_put', 'lowrite', 'lo_truncate', 'lo_truncate64'))
    LOOP
        IF NOT found.is_mine THEN
            RAISE WARNING 'advisory locks and large objects stay open to everybody: a superuser must call'
                ' close_functions_to_public()';
            RETURN;
        END IF;
        EXECUTE format('REVOKE EXECUTE ON FUNCTION %s FROM PUBLIC', found.name);
    END LOOP;
END
$$;
REVOKE EXECUTE ON FUNCTION close_functions_to_public() FROM PUBLIC;

-- Bounds what a reader takes, as far as nobody has set it yet. The timeouts are defaults, which a reader can change; the
-- number of connections and the size of temporary files are not. They hold for whoever logs in with that role.
CREATE FUNCTION bound_reader(role_name text) RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
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
            ('temp_file_limit', '1GB')) b (name, value)
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
REVOKE EXECUTE ON FUNCTION bound_reader(text) FROM PUBLIC;

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
    PERFORM close_functions_to_public();
    PERFORM bound_reader(role_name);
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
        is_visible(uuid, bigint), are_edits_shown(uuid), is_message_shown(uuid, bigint, boolean, uuid),
        is_part_shown(uuid, boolean), is_vote_shown(uuid, uuid, integer[]), is_membership_shown(uuid, uuid, text),
        is_relationship_shown(uuid, uuid, text) TO %I', role_name);
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
