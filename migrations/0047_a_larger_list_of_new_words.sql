-- Whoever finds the list full sorts it in, under the lock of a conversation. A job empties it every few seconds.
ALTER INDEX message_search_words_idx SET (gin_pending_list_limit = 32768);
