-- No statement uses these indexes. The first two were written at each connect.
DROP INDEX user_status_idx;
DROP INDEX user_last_seen_idx;
DROP INDEX user_active_idx;
DROP INDEX conversation_type_idx;
DROP INDEX message_parent_idx;
-- Room for a new version of a row on its own page. Pages that are full already get it as their rows are updated.
ALTER TABLE "user" SET (fillfactor = 85);
