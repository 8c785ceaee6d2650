-- Without a pending list, which each badge would have to read.
CREATE INDEX CONCURRENTLY message_search_mentions_idx ON message_search USING gin (mention_days(words, created_at))
    WITH (fastupdate = off) WHERE has_mentions(words);
