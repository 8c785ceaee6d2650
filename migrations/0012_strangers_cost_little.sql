-- Whether two users are together is asked of the conversations of whoever has fewer.
CREATE OR REPLACE FUNCTION are_together(one uuid, other uuid) RETURNS boolean LANGUAGE plpgsql STABLE AS $$
DECLARE
    fewer uuid := are_together.one;
    more uuid := are_together.other;
BEGIN
    -- The conversations of whoever has fewer are looked through: asking about strangers costs little, also for somebody
    -- who takes part in thousands.
    IF (SELECT count(*) FROM (SELECT FROM public.conversation_participant p WHERE p.user_id = more LIMIT 100) some_of)
        < (SELECT count(*) FROM (SELECT FROM public.conversation_participant p WHERE p.user_id = fewer LIMIT 100) some_of)
    THEN
        fewer := are_together.other;
        more := are_together.one;
    END IF;
    RETURN EXISTS (
        SELECT FROM public.conversation_participant p
        JOIN public.conversation_participant o ON o.conversation_id = p.conversation_id AND o.user_id = more
            AND o.status = 'active'
        JOIN public.conversation c ON c.id = p.conversation_id AND NOT c.is_deleted
        WHERE p.user_id = fewer AND p.status = 'active'
    );
END
$$;
