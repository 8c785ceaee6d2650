-- By the estimates of EXPLAIN, readers of the database learned which values of hidden rows are frequent.

-- Statistics hold samples of all rows, hidden ones too, and the estimates of EXPLAIN tell a reader what is in them
-- (docs/decisions/0051-no-statistics.md). Keeps ANALYZE from making any for tables with policies, and deletes those there are.
CREATE FUNCTION keep_no_statistics() RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    change text;
    found record;
BEGIN
    FOR change IN
        SELECT format('ALTER TABLE public.%I %s', c.relname,
            string_agg(format('ALTER COLUMN %I SET STATISTICS 0', a.attname), ', ' ORDER BY a.attnum))
        FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
        WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'r' AND a.attstattarget IS DISTINCT FROM 0
            AND EXISTS (SELECT FROM pg_policy p WHERE p.polrelid = c.oid)
        GROUP BY c.relname
        UNION ALL
        SELECT format('ALTER INDEX public.%I ALTER COLUMN %s SET STATISTICS 0', c.relname, a.attnum)
        FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
        JOIN pg_attribute a ON a.attrelid = c.oid AND i.indkey[a.attnum - 1] = 0
        WHERE c.relnamespace = 'public'::regnamespace AND a.attstattarget IS DISTINCT FROM 0
            AND EXISTS (SELECT FROM pg_policy p WHERE p.polrelid = i.indrelid)
    LOOP
        EXECUTE change;
    END LOOP;
    BEGIN
        FOR found IN
            SELECT s.tablename, s.attname, s.inherited FROM pg_stats s
            JOIN pg_class c ON c.relname = s.tablename AND c.relnamespace = 'public'::regnamespace
            LEFT JOIN pg_index i ON i.indexrelid = c.oid
            WHERE s.schemaname = 'public' AND EXISTS (SELECT FROM pg_policy p WHERE p.polrelid = coalesce(i.indrelid, c.oid))
        LOOP
            IF current_setting('server_version_num')::integer >= 180000 THEN
                EXECUTE 'SELECT pg_clear_attribute_stats($1, $2, $3, $4)'
                    USING 'public', found.tablename, found.attname, found.inherited;
            ELSE
                DELETE FROM pg_statistic s WHERE s.starelid = format('public.%I', found.tablename)::regclass;
            END IF;
        END LOOP;
    EXCEPTION WHEN insufficient_privilege THEN
        RAISE WARNING 'statistics of hidden rows stay readable by estimates: a superuser must call keep_no_statistics()';
    END;
END
$$;
REVOKE EXECUTE ON FUNCTION keep_no_statistics() FROM PUBLIC;

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
    PERFORM keep_no_statistics();
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
        is_relationship_shown(uuid, uuid, text), is_mine(uuid) TO %I', role_name);
END
$$;

SELECT keep_no_statistics();
