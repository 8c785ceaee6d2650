-- `send` asks what may have changed while it waited for the conversation: whether its sender is still here, and may
-- still read what is forwarded.
CREATE OR REPLACE FUNCTION may_now(action text, viewer uuid, target uuid) RETURNS boolean LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    RETURN EXISTS (SELECT FROM public."user" u WHERE u.id = may_now.viewer AND u.is_active AND NOT u.is_deleted)
        AND (target IS NULL OR public.may(action, viewer, target));
END
$$;
CREATE FUNCTION is_there_now(message uuid, conversation uuid) RETURNS boolean LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    RETURN EXISTS (
        SELECT FROM public.message m
        WHERE m.id = is_there_now.message AND (m.conversation_id = is_there_now.conversation) IS TRUE
            AND NOT m.is_deleted
    );
END
$$;
CREATE FUNCTION may_forward_now(sender uuid, message uuid, conversation uuid, edited timestamptz) RETURNS boolean
    LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    RETURN EXISTS (
        SELECT FROM public.message m
        JOIN public.conversation c ON c.id = m.conversation_id AND NOT c.is_deleted
        JOIN public.conversation_participant p ON p.conversation_id = m.conversation_id
            AND p.user_id = may_forward_now.sender AND p.status = 'active'
        WHERE m.id = may_forward_now.message AND (m.conversation_id = may_forward_now.conversation) IS TRUE
            AND NOT m.is_deleted AND NOT m.is_moderated AND m.sent_version > public.visible_after(c, p)
            AND coalesce(m.edited_at, '-infinity') = coalesce(may_forward_now.edited, '-infinity')
    );
END
$$;
REVOKE EXECUTE ON FUNCTION is_there_now(uuid, uuid), may_forward_now(uuid, uuid, uuid, timestamptz) FROM PUBLIC;
