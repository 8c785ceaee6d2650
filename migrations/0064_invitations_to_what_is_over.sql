-- Whoever is invited to a conversation is found when it is over.
CREATE INDEX CONCURRENTLY participant_invited_to_idx ON conversation_participant
    ((CASE WHEN status = 'invited' THEN conversation_id END))
    WHERE (CASE WHEN status = 'invited' THEN conversation_id END) IS NOT NULL;
