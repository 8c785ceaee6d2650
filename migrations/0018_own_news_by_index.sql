-- What changed for a user since a number of their own clock was read from all rows of theirs, at each of their changes.

CREATE INDEX CONCURRENTLY user_relationship_from_version_idx ON user_relationship (from_user_id, from_version) WHERE from_version > 0;
CREATE INDEX CONCURRENTLY user_relationship_to_version_idx ON user_relationship (to_user_id, to_version) WHERE to_version > 0;
CREATE INDEX CONCURRENTLY participant_user_version_idx ON conversation_participant (user_id, user_version) WHERE user_version > 0;
CREATE INDEX CONCURRENTLY scheduled_message_version_idx ON scheduled_message (sender_id, user_version) WHERE user_version > 0;
CREATE INDEX CONCURRENTLY draft_version_idx ON draft (user_id, user_version) WHERE user_version > 0;

-- Whom a user may not see was looked for among all who follow them, for each conversation that they resumed.
CREATE INDEX CONCURRENTLY user_relationship_hiding_idx ON user_relationship (to_user_id)
    WHERE NOT can_see_online_status OR (type = 'block' AND status = 'active');
