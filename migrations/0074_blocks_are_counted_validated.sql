-- In a transaction of its own, so that nobody waits while the rows are looked at.
ALTER TABLE approach VALIDATE CONSTRAINT approach_kind_known;
