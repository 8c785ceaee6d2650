CREATE INDEX CONCURRENTLY participant_left_version_idx ON conversation_participant (conversation_id, left_version)
    WHERE left_version > 0 AND left_version < version;
