-- Nobody reads in the log that a report about them was dismissed.
CREATE FUNCTION is_action_shown(chain uuid, message uuid, action text) RETURNS boolean
    LANGUAGE sql STABLE SECURITY DEFINER COST 0.0001 SET search_path = pg_catalog, public, pg_temp
    RETURN is_entry_shown(chain, message) AND (action <> 'dismiss_report' OR is_report_shown(chain, message));

REVOKE EXECUTE ON FUNCTION is_action_shown(uuid, uuid, text) FROM PUBLIC;
DROP POLICY audit_entry_access ON audit_entry;
CREATE POLICY audit_entry_access ON audit_entry FOR SELECT USING (is_action_shown(chain, message_id, action));

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
        is_report_shown(uuid, uuid), is_entry_shown(uuid, uuid), is_action_shown(uuid, uuid, text),
        is_follow_shown(uuid, uuid, boolean, bigint) TO %I', role_name);
END
$$;

-- Those who could read so far call the new function.
DO $$
DECLARE
    reader record;
BEGIN
    FOR reader IN
        SELECT DISTINCT r.rolname FROM pg_class c CROSS JOIN aclexplode(c.relacl) a JOIN pg_roles r ON r.oid = a.grantee
        WHERE c.oid = 'user_profile'::regclass AND a.grantee <> c.relowner
    LOOP
        EXECUTE format('GRANT EXECUTE ON FUNCTION is_action_shown(uuid, uuid, text) TO %I', reader.rolname);
    END LOOP;
END
$$;
