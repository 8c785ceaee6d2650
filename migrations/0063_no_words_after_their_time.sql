-- What was scheduled and sent kept its words after the message had disappeared.
UPDATE scheduled_message s SET words = '{"content": ""}'
FROM message m WHERE m.id = s.id AND s.status = 'sent' AND m.is_deleted AND m.deleted_by IS NULL;
