-- The minimal schema of the other chat servers in the comparison.
CREATE TABLE session (token text PRIMARY KEY, user_id uuid NOT NULL, expires_at timestamptz NOT NULL);
CREATE TABLE participant (user_id uuid, conversation_id uuid, PRIMARY KEY (user_id, conversation_id));
CREATE TABLE message (
    id uuid PRIMARY KEY, conversation_id uuid NOT NULL, sender_id uuid NOT NULL, content text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX ON message (conversation_id, created_at);
