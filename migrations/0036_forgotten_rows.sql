-- Clients that were told less than this start their own lists over: a row that they may have is deleted.
ALTER TABLE "user" ADD COLUMN forgotten_version bigint NOT NULL DEFAULT 0;
ALTER TABLE "user" ALTER COLUMN forgotten_version SET STATISTICS 0;
