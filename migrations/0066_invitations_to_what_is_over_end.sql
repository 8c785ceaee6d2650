-- A job ends the invitations to conversations that were over before, and tells those who have them.
DO $$
DECLARE
    about uuid;
BEGIN
    FOR about IN
        SELECT DISTINCT o.id FROM conversation_participant p JOIN conversation o ON o.id = p.conversation_id
        WHERE p.status = 'invited' AND (o.is_deleted OR NOT o.is_active) AND NOT o.has_remains
    LOOP
        UPDATE conversation SET has_remains = true WHERE id = about;
        COMMIT; -- and let go of a conversation before the next one is locked
    END LOOP;
END $$;
