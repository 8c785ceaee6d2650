-- An older worker beside this version finds what is due by the index that 0061 built.
DROP INDEX scheduled_message_due_idx;
