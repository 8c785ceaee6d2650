-- Entries that are to be deleted; the server's own log stays.
CREATE INDEX CONCURRENTLY audit_entry_created_idx ON audit_entry (created_at)
    WHERE chain <> '00000000-0000-0000-0000-000000000000';
