-- Drafts in a conversation that was deleted are emptied later by a job. No query shows them meanwhile.
ALTER TABLE conversation ADD COLUMN has_remains boolean NOT NULL DEFAULT false;
ALTER TABLE conversation ALTER COLUMN has_remains SET STATISTICS 0;
