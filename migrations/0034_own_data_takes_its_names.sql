-- The indexes that 0033 built take the places of the old ones.
DROP INDEX message_reaction_user_idx;
ALTER INDEX message_reaction_user_new_idx RENAME TO message_reaction_user_idx;
DROP INDEX poll_vote_user_idx;
ALTER INDEX poll_vote_user_new_idx RENAME TO poll_vote_user_idx;
