-- An older worker beside this version searches names slowly, or refuses that.
DROP INDEX user_search_idx, conversation_search_idx;
ALTER INDEX user_words_idx ALTER COLUMN 1 SET STATISTICS 0;
ALTER INDEX conversation_words_idx ALTER COLUMN 1 SET STATISTICS 0;
