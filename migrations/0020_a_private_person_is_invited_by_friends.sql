-- Participants of the same conversation could invite a private person and not one who blocks them, which told of the block.

CREATE OR REPLACE FUNCTION may(action text, viewer uuid, target uuid) RETURNS boolean LANGUAGE plpgsql STABLE AS $$
#variable_conflict use_column
DECLARE
    them record;
    theirs record;
BEGIN
    IF viewer = target THEN
        RETURN action IN ('see_face', 'see_profile', 'see_presence');
    END IF;
    SELECT u.is_active AND NOT u.is_deleted AS is_here, u.erased_at, u.is_private, u.allow_friend_requests,
        u.show_online_status, u.allow_adding
    INTO them FROM public."user" u WHERE u.id = may.target;
    IF NOT FOUND OR viewer IS NULL THEN
        RETURN false;
    ELSIF them.erased_at IS NOT NULL OR NOT them.is_here THEN
        -- What they said stays, and needs a name; without them, that is all.
        RETURN action = 'see_face' AND (them.erased_at IS NOT NULL OR public.are_together(viewer, target));
    END IF;
    SELECT coalesce(bool_or(r.type = 'block' AND r.status = 'active'), false) AS blocks,
        coalesce(bool_or(r.type = 'friend' AND r.status = 'accepted'), false) AS is_friend,
        coalesce(bool_and(r.can_see_online_status), true) AS presence,
        coalesce(bool_and(r.can_see_profile), true) AS profile,
        coalesce(bool_and(r.can_send_messages), true) AS messages
    INTO theirs FROM public.user_relationship r WHERE r.from_user_id = may.target AND r.to_user_id = may.viewer;
    IF theirs.blocks THEN
        -- In a conversation a private face is shown: if this one were hidden there, that would reveal the block.
        RETURN action = 'see_face' AND public.are_together(viewer, target);
    ELSIF (action = 'see_presence' AND NOT (them.show_online_status AND theirs.presence))
        OR (action = 'see_profile' AND NOT theirs.profile)
        OR (action IN ('write', 'invite', 'add') AND NOT theirs.messages)
        OR (action = 'add' AND NOT (theirs.is_friend AND them.allow_adding))
        OR (action = 'request_friend' AND NOT them.allow_friend_requests)
    THEN
        RETURN false;
    ELSIF action IN ('see_face', 'see_profile') THEN
        NULL;
    ELSIF EXISTS (
        SELECT FROM public.user_relationship r
        WHERE r.from_user_id = may.viewer AND r.to_user_id = may.target AND r.type = 'block' AND r.status = 'active'
    ) THEN
        RETURN false;
    END IF;
    IF NOT them.is_private OR theirs.is_friend OR action = 'request_friend' THEN
        RETURN true;
    END IF;
    RETURN action NOT IN ('see_profile', 'follow', 'invite', 'add') AND public.are_together(viewer, target);
END
$$;
