-- A job ends the invitations to conversations that were over before, and tells those who have them.
DO $$
BEGIN
    LOOP
        UPDATE conversation c SET has_remains = true FROM (
            SELECT o.id FROM conversation_participant p JOIN conversation o ON o.id = p.conversation_id
            WHERE p.status = 'invited' AND (o.is_deleted OR NOT o.is_active) AND NOT o.has_remains
            LIMIT 500 FOR NO KEY UPDATE OF o
        ) t WHERE c.id = t.id;
        EXIT WHEN NOT FOUND;
        COMMIT;
    END LOOP;
END $$;
