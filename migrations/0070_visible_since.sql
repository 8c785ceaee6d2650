-- When they stopped being invisible: a device that went before is not told of.
ALTER TABLE "user" ADD COLUMN visible_since timestamptz;
ALTER TABLE "user" ALTER COLUMN visible_since SET STATISTICS 0;
