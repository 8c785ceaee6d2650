-- Searches for common words read the newest messages until a page is full (docs/decisions/0087).
CREATE INDEX CONCURRENTLY message_search_newest_idx ON message_search (conversation_id, created_at, message_id);
CREATE INDEX CONCURRENTLY message_special_idx ON message (conversation_id, created_at, id)
    WHERE content_type NOT IN ('text', 'system');
