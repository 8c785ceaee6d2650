CREATE INDEX CONCURRENTLY conversation_remains_idx ON conversation (id) WHERE has_remains;
CREATE INDEX CONCURRENTLY draft_conversation_idx ON draft (conversation_id, user_id) WHERE content <> '';
CREATE INDEX CONCURRENTLY participant_heir_idx ON conversation_participant
    ((CASE WHEN status = 'active' THEN role END), conversation_id, joined_at, user_id);
