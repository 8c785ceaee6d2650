-- One rule for everything that says something in a conversation, also asked again by who has waited for a lock.

-- What keeps a participant from saying anything in a conversation, whichever frame would say it: null if nothing does.
-- 'slow' is everyone's whom slow mode may have wait: slow_mode_wait() says for how long.
CREATE FUNCTION obstacle(c conversation, p conversation_participant) RETURNS text LANGUAGE sql STABLE
    RETURN CASE WHEN c.is_archived THEN 'archived'
        WHEN NOT may_send(c, p.role, true) THEN 'role'
        WHEN c.type = 'direct' AND NOT may('write', p.user_id,
            CASE WHEN c.direct_low = p.user_id THEN c.direct_high ELSE c.direct_low END) THEN 'unwanted'
        WHEN NOT may_send(c, p.role, false) THEN 'slow' END;

-- For how many milliseconds slow mode has a participant wait.
CREATE FUNCTION slow_mode_wait(c conversation, p conversation_participant) RETURNS integer LANGUAGE sql STABLE
    RETURN CASE WHEN may_send(c, p.role, false) OR p.last_sent_at IS NULL THEN 0
        ELSE greatest(0, ceil(1000 * coalesce((c.settings ->> 'slow_mode_seconds')::integer, 0)
            - 1000 * extract(epoch FROM now() - p.last_sent_at)))::integer END;

-- may() as of now, not as of when the statement began: for a statement that has waited for a lock since.
CREATE FUNCTION may_now(action text, viewer uuid, target uuid) RETURNS boolean LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    RETURN may(action, viewer, target);
END
$$;

REVOKE EXECUTE ON FUNCTION may_now(text, uuid, uuid), obstacle(conversation, conversation_participant) FROM PUBLIC;
