-- Old entries of a conversation's audit log are deleted: its number and hash go on from the last one that was.
ALTER TABLE conversation
    ADD COLUMN audit_number bigint NOT NULL DEFAULT 0,
    ADD COLUMN audit_hash bytea NOT NULL DEFAULT '';
ALTER TABLE conversation ALTER COLUMN audit_number SET STATISTICS 0, ALTER COLUMN audit_hash SET STATISTICS 0;
