-- What still waits of one sender, beside all that is over.
CREATE INDEX CONCURRENTLY scheduled_message_waiting_idx ON scheduled_message (sender_id, send_at)
    WHERE status = 'waiting';
