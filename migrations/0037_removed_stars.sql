-- The oldest tombstones of stars are deleted.
CREATE INDEX CONCURRENTLY message_star_removed_idx ON message_star (user_id, user_version) WHERE is_removed;
