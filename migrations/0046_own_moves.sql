-- Workers tell a draft from a membership by it. Workers of an older release do not count: all is read again.
ALTER TABLE "user" ADD COLUMN own_moves bigint NOT NULL DEFAULT 0;
ALTER TABLE "user" ALTER COLUMN own_moves SET STATISTICS 0;
