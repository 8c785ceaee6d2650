-- EXPLAIN (ANALYZE) told readers of the database what hidden rows hold: comparisons are leakproof, and were made before
-- the policies, which cost more. Each policy is one call now, and costs less than any operator.

ALTER FUNCTION may_i(text, uuid) COST 0.0001;
ALTER FUNCTION is_participant(uuid) COST 0.0001;
ALTER FUNCTION is_allowed(uuid, text, text) COST 0.0001;
ALTER FUNCTION is_visible(uuid, bigint) COST 0.0001;

-- The policies of tables, one call each, so that nothing of a reader's comes between the parts of a policy.
CREATE FUNCTION is_message_shown(conversation uuid, sent_version bigint, is_moderated boolean, sender uuid) RETURNS boolean
    LANGUAGE sql STABLE SECURITY DEFINER COST 0.0001 SET search_path = pg_catalog, public, pg_temp
    RETURN is_visible(conversation, sent_version) AND (NOT is_moderated OR sender = current_user_id()
        OR is_allowed(conversation, 'moderator', 'can_delete_messages'));

CREATE FUNCTION is_part_shown(message uuid, of_deleted boolean) RETURNS boolean
    LANGUAGE sql STABLE SECURITY DEFINER COST 0.0001 SET search_path = pg_catalog, public, pg_temp
    RETURN EXISTS (
        SELECT FROM message m WHERE m.id = is_part_shown.message AND (of_deleted OR NOT m.is_deleted)
            AND is_message_shown(m.conversation_id, m.sent_version, m.is_moderated, m.sender_id)
    );

-- Whether the reader may see what a message said before: as its sender, a moderator, or if the settings show it to all.
CREATE OR REPLACE FUNCTION are_edits_shown(message uuid) RETURNS boolean LANGUAGE sql STABLE SECURITY DEFINER COST 0.0001
    SET search_path = pg_catalog, public, pg_temp
    RETURN is_part_shown(message, false) AND EXISTS (
        SELECT FROM message m JOIN conversation c ON c.id = m.conversation_id
        JOIN conversation_participant p ON p.conversation_id = c.id AND p.user_id = current_user_id()
        WHERE m.id = are_edits_shown.message AND shows_edits(c, p, m.sender_id)
    );

-- A poll that was deleted, or that a moderator hides, has no votes, and a vote that was withdrawn is none. A deleted message
-- has no payload, so whether it was anonymous is not known: what the policies allow, they allow by what is there.
CREATE FUNCTION is_vote_shown(message uuid, voter uuid, options integer[]) RETURNS boolean
    LANGUAGE sql STABLE SECURITY DEFINER COST 0.0001 SET search_path = pg_catalog, public, pg_temp
    RETURN options <> '{}' AND is_part_shown(message, false) AND EXISTS (
        SELECT FROM message m WHERE m.id = is_vote_shown.message AND NOT m.is_moderated AND m.payload IS NOT NULL
            AND (voter = current_user_id() OR NOT coalesce((m.payload ->> 'is_anonymous')::boolean, false))
    );

CREATE FUNCTION is_membership_shown(conversation uuid, member uuid, status text) RETURNS boolean
    LANGUAGE sql STABLE SECURITY DEFINER COST 0.0001 SET search_path = pg_catalog, public, pg_temp
    RETURN is_participant(conversation) AND (status = 'active' OR member = current_user_id()
        OR is_allowed(conversation, 'admin', 'can_remove_members'));

-- Nobody learns who blocked or muted them.
CREATE FUNCTION is_relationship_shown(from_user uuid, to_user uuid, type text) RETURNS boolean
    LANGUAGE sql STABLE SECURITY DEFINER COST 0.0001 SET search_path = pg_catalog, public, pg_temp
    RETURN from_user = current_user_id() OR (to_user = current_user_id() AND type IN ('friend', 'follow'));

DROP POLICY conversation_participant_access ON conversation_participant;
DROP POLICY message_access ON message;
DROP POLICY message_reaction_access ON message_reaction;
DROP POLICY message_edit_access ON message_edit;
DROP POLICY poll_vote_access ON poll_vote;
DROP POLICY attachment_access ON attachment;
DROP POLICY user_relationship_access ON user_relationship;
CREATE POLICY conversation_participant_access ON conversation_participant FOR SELECT
    USING (is_membership_shown(conversation_id, user_id, status));
CREATE POLICY message_access ON message FOR SELECT
    USING (is_message_shown(conversation_id, sent_version, is_moderated, sender_id));
CREATE POLICY message_reaction_access ON message_reaction FOR SELECT USING (is_part_shown(message_id, true));
CREATE POLICY message_edit_access ON message_edit FOR SELECT USING (are_edits_shown(message_id));
CREATE POLICY poll_vote_access ON poll_vote FOR SELECT USING (is_vote_shown(message_id, user_id, options));
CREATE POLICY attachment_access ON attachment FOR SELECT USING (is_part_shown(message_id, false));
CREATE POLICY user_relationship_access ON user_relationship FOR SELECT
    USING (is_relationship_shown(from_user_id, to_user_id, type));

REVOKE EXECUTE ON FUNCTION is_message_shown(uuid, bigint, boolean, uuid),
    is_part_shown(uuid, boolean), is_vote_shown(uuid, uuid, integer[]), is_membership_shown(uuid, uuid, text),
    is_relationship_shown(uuid, uuid, text) FROM PUBLIC;

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
