-- The conversations and the reports of a user within a day are counted by an index.

DROP INDEX conversation_created_by_idx;
CREATE INDEX conversation_created_by_idx ON conversation (created_by, created_at);
CREATE INDEX report_reporter_idx ON report (reporter_id, created_at);
