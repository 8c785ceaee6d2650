-- No two conversations may share Python's hash of their ids.
CREATE UNIQUE INDEX CONCURRENTLY conversation_id_hash_key ON conversation (id_hash(id));
