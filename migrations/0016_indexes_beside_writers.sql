-- Built while others write: each statement by itself, outside a transaction. What is there already stays. Those whose
-- columns change get the name of the old one in 0017.
CREATE INDEX CONCURRENTLY participant_invited_idx ON conversation_participant (user_id) WHERE status = 'invited';
CREATE INDEX CONCURRENTLY participant_invited_by_idx ON conversation_participant (invited_by) WHERE status = 'invited';
CREATE INDEX CONCURRENTLY report_reporter_idx ON report (reporter_id, created_at);
CREATE INDEX CONCURRENTLY conversation_created_by_new_idx ON conversation (created_by, created_at);
-- With all that a row is looked up by in either index, somebody who is in thousands of conversations, or whom thousands
-- mute, costs no more than others.
CREATE INDEX CONCURRENTLY participant_user_new_idx ON conversation_participant (user_id, conversation_id);
CREATE INDEX CONCURRENTLY user_relationship_to_new_idx ON user_relationship (to_user_id, type, from_user_id);
