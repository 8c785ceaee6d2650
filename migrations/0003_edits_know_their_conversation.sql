-- Every row about a conversation names it: that is what lets the tables be divided by conversation (docs/scale.md).
ALTER TABLE message_edit ADD COLUMN conversation_id uuid;
UPDATE message_edit e SET conversation_id = m.conversation_id FROM message m WHERE m.id = e.message_id;
ALTER TABLE message_edit
    ALTER COLUMN conversation_id SET NOT NULL,
    ADD CONSTRAINT message_edit_conversation_fkey FOREIGN KEY (conversation_id) REFERENCES conversation (id)
        ON DELETE CASCADE;
