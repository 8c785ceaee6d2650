-- The index that 0022 built takes the place of the old one.
DROP INDEX thread_follow_user_idx;
ALTER INDEX thread_follow_user_new_idx RENAME TO thread_follow_user_idx;
