-- Statistics would hold samples of rows that readers may not see (docs/decisions/0051-no-statistics.md).
ALTER INDEX participant_invited_to_idx ALTER COLUMN 1 SET STATISTICS 0;
