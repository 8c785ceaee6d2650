-- Scheduled messages that are over are deleted after a while.
CREATE INDEX CONCURRENTLY scheduled_message_over_idx ON scheduled_message (send_at) WHERE status <> 'waiting';
