-- A message that slow mode put off counted as claimed for up to six hours: its owner could not change or cancel it.

ALTER TABLE scheduled_message ADD COLUMN not_before timestamptz;
ALTER TABLE scheduled_message ALTER COLUMN not_before SET STATISTICS 0;

CREATE OR REPLACE FUNCTION scheduled_json(s scheduled_message) RETURNS json LANGUAGE sql STABLE
    RETURN json_build_object(
        'message_id', s.id,
        'conversation_id', s.conversation_id,
        'words', s.words,
        'send_at', s.send_at,
        'status', s.status,
        'problem', s.problem,
        'created_at', s.created_at,
        'not_before', s.not_before
    );
