-- Of two who take part in thousands of conversations, one's are compared with the other's as an array.
CREATE OR REPLACE FUNCTION are_together(one uuid, other uuid) RETURNS boolean LANGUAGE plpgsql STABLE AS $$
DECLARE
    fewer uuid := are_together.one;
    more uuid := are_together.other;
    most integer := 64;
    these bigint;
    those bigint;
    theirs uuid[];
BEGIN
    -- Who writes to somebody shares at least that conversation: `send` asks this for every direct message.
    IF EXISTS (
        SELECT FROM public.conversation c
        JOIN public.conversation_participant p ON p.conversation_id = c.id AND p.user_id = fewer AND p.status = 'active'
        JOIN public.conversation_participant o ON o.conversation_id = c.id AND o.user_id = more AND o.status = 'active'
        WHERE c.direct_low = least(fewer, more) AND c.direct_high = greatest(fewer, more) AND NOT c.is_deleted
    ) THEN
        RETURN true;
    END IF;
    -- The conversations of whoever has fewer are looked through: asking about strangers costs little, also for somebody
    -- who takes part in thousands. To count costs a tenth of looking, and goes on until one of them has no more.
    LOOP
        these := (SELECT count(*)
            FROM (SELECT FROM public.conversation_participant p WHERE p.user_id = fewer LIMIT most) some_of);
        those := (SELECT count(*)
            FROM (SELECT FROM public.conversation_participant p WHERE p.user_id = more LIMIT most) some_of);
        EXIT WHEN these < most OR those < most;
        most := most * 8;
    END LOOP;
    IF those < these THEN
        fewer := are_together.other;
        more := are_together.one;
    END IF;
    -- Who shares many conversations shares one of the first. LIMIT and OFFSET 0 keep the order: to the planner, which does
    -- not know them, both have as many.
    IF EXISTS (
        SELECT FROM (
            SELECT p.conversation_id FROM public.conversation_participant p
            WHERE p.user_id = fewer AND p.status = 'active' LIMIT 64
        ) some_of, LATERAL (
            SELECT FROM public.conversation_participant o
            JOIN public.conversation c ON c.id = o.conversation_id AND NOT c.is_deleted
            WHERE o.conversation_id = some_of.conversation_id AND o.user_id = more AND o.status = 'active' OFFSET 0
        ) shared
    ) THEN
        RETURN true;
    ELSIF least(these, those) <= 64 THEN
        RETURN false;
    END IF;
    -- Of two who have thousands, an array of the rest costs a seventh of asking for each.
    theirs := ARRAY(
        SELECT p.conversation_id FROM public.conversation_participant p
        WHERE p.user_id = fewer AND p.status = 'active'
    );
    RETURN EXISTS (
        SELECT FROM public.conversation_participant o
        JOIN public.conversation c ON c.id = o.conversation_id AND NOT c.is_deleted
        WHERE o.user_id = more AND o.status = 'active' AND o.conversation_id = ANY(theirs)
    );
END
$$;
