-- What was scheduled and sent kept its words after the message had disappeared.
DO $$
DECLARE
    sent uuid;
    changed integer := 0;
BEGIN
    FOR sent IN
        SELECT s.id FROM scheduled_message s JOIN message m ON m.id = s.id
        WHERE s.status = 'sent' AND s.words <> '{"content": ""}' AND m.is_deleted AND m.deleted_by IS NULL
    LOOP
        UPDATE scheduled_message SET words = '{"content": ""}' WHERE id = sent;
        changed := changed + 1;
        IF changed % 100 = 0 THEN
            COMMIT;
        END IF;
    END LOOP;
END
$$;
