-- Nobody sees who has reported them.
CREATE OR REPLACE FUNCTION is_report_shown(conversation uuid, message uuid) RETURNS boolean
    LANGUAGE sql STABLE SECURITY DEFINER COST 0.0001 SET search_path = pg_catalog, public, pg_temp
    RETURN is_allowed(conversation, 'moderator', 'can_delete_messages') AND is_past_shown(conversation, message)
        AND NOT EXISTS (
            SELECT FROM message m WHERE m.id = is_report_shown.message AND m.sender_id = current_user_id()
        );
