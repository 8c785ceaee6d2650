-- Who is invited, has declined or is banned is for those who see to it: one rule for every way to learn of it.
ALTER TABLE conversation_participant ADD COLUMN left_version bigint NOT NULL DEFAULT 0;
ALTER TABLE conversation_participant ALTER COLUMN left_version SET STATISTICS 0;

-- The one rule of who learns what of a participation (docs/decisions/0052): `sees_participant` for whoever asks,
-- `participant_event` for what everybody is told.

-- Whether `viewer`, whose own part is `me`, sees the part of somebody and its status. An invitation and its refusal are
-- for those who may add or remove people, for whoever sent it while they take part, and for whoever got it; a ban is for
-- the first alone.
CREATE FUNCTION sees_participant(viewer uuid, me conversation_participant, them conversation_participant)
    RETURNS boolean LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN CASE
        WHEN them.status = 'active' THEN (me.status = 'active') IS TRUE
        WHEN them.status NOT IN ('invited', 'declined', 'banned') THEN false
        WHEN them.status <> 'banned' AND them.user_id = viewer THEN true
        ELSE (me.status = 'active' AND (can(me.role, 'admin', me.can_add_members OR me.can_remove_members)
            OR (them.status <> 'banned' AND them.invited_by = viewer))) IS TRUE END;

-- The clock when somebody left, and 0 if they take part or never did. Versions before 0030 kept `left_at` alone.
CREATE FUNCTION gone_version(p conversation_participant) RETURNS bigint LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN CASE WHEN p.status = 'active' THEN 0
        WHEN p.left_version > 0 THEN p.left_version
        WHEN p.status IN ('left', 'removed', 'banned') AND p.left_at IS NOT NULL THEN p.version
        ELSE 0 END;

-- That somebody takes part no more, and nothing about why.
CREATE FUNCTION participant_left_json(p conversation_participant, participant_count integer) RETURNS json
    LANGUAGE sql STABLE
    RETURN json_build_object('type', 'participant_left', 'conversation_id', p.conversation_id,
        'version', gone_version(p), 'user_id', p.user_id, 'participant_count', participant_count);

-- What everybody in the conversation is told of a participant's last change. Of somebody who did not take part before
-- it, and does not after it, that is nothing but the version.
CREATE FUNCTION participant_event(p conversation_participant, participant_count integer) RETURNS json
    LANGUAGE sql STABLE
    RETURN CASE WHEN p.status = 'active' THEN json_build_object('type', 'participant_changed',
            'conversation_id', p.conversation_id, 'version', p.version, 'participant', participant_json(p),
            'participant_count', participant_count)
        WHEN gone_version(p) = p.version THEN participant_left_json(p, participant_count)
        ELSE json_build_object('type', 'outsiders_changed', 'conversation_id', p.conversation_id,
            'version', p.version) END;

CREATE OR REPLACE FUNCTION is_membership_shown(conversation uuid, member uuid, status text) RETURNS boolean
    LANGUAGE sql STABLE SECURITY DEFINER COST 0.0001 SET search_path = pg_catalog, public, pg_temp
    RETURN CASE WHEN status = 'active' THEN is_participant(conversation) ELSE EXISTS (
        SELECT FROM conversation_participant them
        JOIN conversation c ON c.id = them.conversation_id AND NOT c.is_deleted
        LEFT JOIN conversation_participant me ON me.conversation_id = c.id AND me.user_id = current_user_id()
        WHERE them.conversation_id = is_membership_shown.conversation AND them.user_id = is_membership_shown.member
            AND sees_participant(current_user_id(), me, them)
    ) END;
