-- The indexes that 0016 built take the places of the old ones.
DROP INDEX conversation_created_by_idx;
ALTER INDEX conversation_created_by_new_idx RENAME TO conversation_created_by_idx;
DROP INDEX participant_user_idx;
ALTER INDEX participant_user_new_idx RENAME TO participant_user_idx;
DROP INDEX user_relationship_to_idx;
ALTER INDEX user_relationship_to_new_idx RENAME TO user_relationship_to_idx;
