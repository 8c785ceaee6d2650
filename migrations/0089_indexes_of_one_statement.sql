-- Each of these indexes has an expression as its condition, which only the statements that need the index have.
CREATE INDEX CONCURRENTLY participant_changed_idx ON conversation_participant
    ((CASE WHEN version > 0 THEN conversation_id END), version)
    WHERE (CASE WHEN version > 0 THEN conversation_id END) IS NOT NULL;
CREATE INDEX CONCURRENTLY participant_outsider_idx ON conversation_participant
    ((CASE WHEN status IN ('invited', 'declined', 'banned') THEN status END), conversation_id, user_id)
    WHERE (CASE WHEN status IN ('invited', 'declined', 'banned') THEN status END) IS NOT NULL;
CREATE INDEX CONCURRENTLY participant_role_idx ON conversation_participant
    ((CASE WHEN status = 'active' THEN role END), conversation_id, joined_at, user_id)
    WHERE (CASE WHEN status = 'active' THEN role END) IS NOT NULL;
