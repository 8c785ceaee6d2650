-- How often somebody has tried to reach somebody else since `began_at`, by kind. Rows older than a day are deleted.
CREATE TABLE approach (
    from_user_id uuid NOT NULL CONSTRAINT approach_from_fkey REFERENCES "user" (id) ON DELETE CASCADE,
    to_user_id uuid NOT NULL CONSTRAINT approach_to_fkey REFERENCES "user" (id) ON DELETE CASCADE,
    kind text NOT NULL CONSTRAINT approach_kind_known CHECK (kind IN ('add', 'invite', 'friend', 'follow')),
    made integer NOT NULL DEFAULT 1,
    began_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT approach_pkey PRIMARY KEY (from_user_id, to_user_id, kind)
);
CREATE INDEX approach_began_idx ON approach (began_at);
CREATE INDEX approach_to_idx ON approach (to_user_id);

ALTER TABLE approach ENABLE ROW LEVEL SECURITY;
