CREATE INDEX CONCURRENTLY message_remains_idx ON message (id) WHERE has_remains;
