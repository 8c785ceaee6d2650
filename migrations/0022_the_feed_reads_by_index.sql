-- The feed sorted all that could be in it, each time that it or a badge was read.

CREATE INDEX CONCURRENTLY message_loud_idx ON message (conversation_id, created_at, id) WHERE loud_mentions <> '{}';
CREATE INDEX CONCURRENTLY thread_follow_user_new_idx ON thread_follow (user_id, is_following, root_id);
CREATE INDEX CONCURRENTLY user_relationship_pending_idx ON user_relationship (to_user_id, updated_at, id)
    WHERE type = 'friend' AND status = 'pending';
