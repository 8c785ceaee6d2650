-- Statistics would hold samples of rows that readers may not see (docs/decisions/0051-no-statistics.md).
ALTER INDEX participant_changed_idx ALTER COLUMN 1 SET STATISTICS 0;
ALTER INDEX participant_outsider_idx ALTER COLUMN 1 SET STATISTICS 0;
ALTER INDEX participant_role_idx ALTER COLUMN 1 SET STATISTICS 0;
-- Plans took the first and the last one to find one user in a conversation, and read all participants. Older workers
-- read more rows for a resume without the first one, and to end invitations without the second one.
DROP INDEX participant_version_idx;
DROP INDEX participant_invited_to_idx;
DROP INDEX participant_heir_idx;
