-- Reactions and votes of a deleted message are deleted later by a job. No reader sees them meanwhile.
ALTER TABLE message ADD COLUMN has_remains boolean NOT NULL DEFAULT false;
ALTER TABLE message ALTER COLUMN has_remains SET STATISTICS 0;
ALTER POLICY message_reaction_access ON message_reaction USING (is_part_shown(message_id, false));
