-- What is due is read in pages, by the whole key. 0062 takes away the index that this one replaces.
CREATE INDEX CONCURRENTLY scheduled_message_turn_idx ON scheduled_message (send_at, id) WHERE status = 'waiting';
