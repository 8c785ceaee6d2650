-- A block moves a clock that nobody is told of, not that of whom it is against.

ALTER TABLE "user" ADD COLUMN hidden_version bigint NOT NULL DEFAULT 0;
