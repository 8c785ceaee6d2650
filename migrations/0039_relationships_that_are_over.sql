-- Relationships that have ended and say nothing any more are deleted after a while.
CREATE INDEX CONCURRENTLY user_relationship_over_idx ON user_relationship (updated_at)
    WHERE status = 'inactive' AND can_see_online_status AND can_send_messages AND can_see_profile
        AND notifications_enabled;
