-- An older worker beside this version resets no `left_version` when somebody joins, and sets none when they leave.
CREATE OR REPLACE FUNCTION gone_version(p conversation_participant) RETURNS bigint LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN CASE WHEN p.status = 'active' THEN 0
        WHEN p.left_version > p.joined_version THEN p.left_version
        WHEN p.status IN ('left', 'removed', 'banned') AND p.left_at IS NOT NULL THEN p.version
        ELSE 0 END;
