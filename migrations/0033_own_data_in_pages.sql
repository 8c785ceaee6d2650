-- A person's own reactions, votes and deeds are read in pages, by the whole key. 0034 gives the first two their names.
CREATE INDEX CONCURRENTLY message_reaction_user_new_idx ON message_reaction (user_id, message_id, emoji);
CREATE INDEX CONCURRENTLY poll_vote_user_new_idx ON poll_vote (user_id, message_id);
CREATE INDEX CONCURRENTLY audit_entry_actor_idx ON audit_entry (actor_id, chain, number);
