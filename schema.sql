-- OpenChat's database, whole: what a new installation gets. Read it after protocol/.
--
-- The one idea to know: every conversation has a clock, conversation.version. Each durable change takes the
-- next number in the statement that makes it and stamps the row it changed, so that "what changed since v" is
-- one indexed read per table, and deletions (soft) are part of the answer. See docs/decisions/0002-one-clock.md.
--
-- Older databases arrive here through migrations/; tests/test_schema.py proves that both ways end alike.

-- ------------------------------------------------------------------------------------------------ users

-- Text as its words are found: without punctuation, as queries are. PostgreSQL's parser tries addresses, paths and tags
-- at each word, up to the next space: 10,000 characters of `1a@1a@…` took seconds. Runs are replaced at once: translate()
-- compared each character with each mark, which took as long as finding the words.
CREATE FUNCTION unpunctuated(text text) RETURNS text LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN regexp_replace(text, '[!-/:-@[-`{-~]+', ' ', 'g');

CREATE TABLE "user" (
    id uuid CONSTRAINT user_pkey PRIMARY KEY DEFAULT gen_random_uuid(),
    name text NOT NULL CONSTRAINT user_name_length CHECK (char_length(name) BETWEEN 1 AND 255),
    -- Kept in lower case, so that the unique constraint means what people expect of an address.
    email text NOT NULL CONSTRAINT user_email_key UNIQUE CONSTRAINT user_email_lower CHECK (email = lower(email)),
    email_verified boolean NOT NULL DEFAULT false,
    image text,
    display_name text CONSTRAINT user_display_name_length CHECK (char_length(display_name) BETWEEN 1 AND 255),
    bio text CONSTRAINT user_bio_length CHECK (char_length(bio) <= 500),
    location text CONSTRAINT user_location_length CHECK (char_length(location) BETWEEN 1 AND 255),
    website text,
    -- Presence as of the last transition; the live truth is in presence (server/domain/presence.py).
    is_online boolean NOT NULL DEFAULT false,
    last_seen_at timestamptz,
    -- What the user chose to be seen as while connected. 'offline' here means "never chosen": online.
    status text NOT NULL DEFAULT 'offline'
        CONSTRAINT user_status_known CHECK (status IN ('online', 'away', 'busy', 'invisible', 'offline')),
    custom_status text CONSTRAINT user_custom_status_length CHECK (char_length(custom_status) BETWEEN 1 AND 255),
    is_active boolean NOT NULL DEFAULT true,
    is_deleted boolean NOT NULL DEFAULT false,
    deleted_at timestamptz,
    is_private boolean NOT NULL DEFAULT false,
    allow_friend_requests boolean NOT NULL DEFAULT true,
    show_online_status boolean NOT NULL DEFAULT true,
    -- The user's own clock: it moves when their conversations, sessions, invitations, relationships, preferences
    -- or profile change. What changed keeps its number, so that whoever missed the news finds out by comparing one.
    version bigint NOT NULL DEFAULT 0,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    -- The own clock when the profile or the privacy settings last changed.
    own_version bigint NOT NULL DEFAULT 0,
    custom_status_until timestamptz,
    -- Locked by an administrator: logging in does not bring it back, as it does after deactivating oneself.
    is_disabled boolean NOT NULL DEFAULT false,
    -- A server administrator (docs/administration.md says what that opens, and what not).
    is_admin boolean NOT NULL DEFAULT false,
    -- When nothing was left of the person but the row that their messages refer to.
    erased_at timestamptz,
    -- Between these times of day, in this zone, nothing is pushed to them.
    quiet_from time,
    quiet_until time,
    time_zone text NOT NULL DEFAULT 'UTC',
    -- What is newer than this in the feed (see queries/feed.py) is new to them.
    feed_seen_at timestamptz,
    -- With which code (protocol/errors.py) the server closed the last of their connections, if it was the server: for `why`.
    last_close integer,
    -- Whether friends may add them to groups and channels without asking.
    allow_adding boolean NOT NULL DEFAULT true,
    -- It moves when somebody blocks or unblocks them, or sets a switch about them, so that what they watch is checked
    -- again. Nobody is told of it: their own clock would tell of the block.
    hidden_version bigint NOT NULL DEFAULT 0,
    -- The highest number of the own clock that a deleted row of theirs had: whoever was told less may have that row.
    forgotten_version bigint NOT NULL DEFAULT 0,
    -- How often the own clock moved for rows that are theirs alone (drafts, stars, preferences, the profile). All other
    -- moves may concern memberships, sessions or relationships, and workers read those again.
    own_moves bigint NOT NULL DEFAULT 0,
    -- When they stopped being invisible. No device that went before that moves `last_seen_at`.
    visible_since timestamptz
)
-- Each connection writes presence, and each change moves the clock. With room on the page, and no index on those
-- columns, that changes no index (HOT).
WITH (fillfactor = 85);
CREATE INDEX user_words_idx ON "user"
    USING gin (to_tsvector('simple', unpunctuated(name || ' ' || coalesce(display_name, ''))));
CREATE INDEX user_custom_status_until_idx ON "user" (custom_status_until) WHERE custom_status_until IS NOT NULL;
CREATE INDEX user_to_erase_idx ON "user" (deleted_at) WHERE is_deleted AND erased_at IS NULL;

CREATE TABLE session (
    id uuid CONSTRAINT session_pkey PRIMARY KEY DEFAULT gen_random_uuid(),
    user_id uuid NOT NULL CONSTRAINT session_user_fkey REFERENCES "user" (id) ON DELETE CASCADE,
    -- SHA-256 of the token, in hex. The token itself (256 random bits) is only ever in the client's hands.
    token text NOT NULL CONSTRAINT session_token_key UNIQUE,
    expires_at timestamptz NOT NULL,
    ip_address text,
    user_agent text,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX session_user_idx ON session (user_id);
CREATE INDEX session_expires_idx ON session (expires_at);

-- One linked login. provider_id 'credential' is a password (argon2id), whose account_id is the e-mail address.
CREATE TABLE account (
    id uuid CONSTRAINT account_pkey PRIMARY KEY DEFAULT gen_random_uuid(),
    user_id uuid NOT NULL CONSTRAINT account_user_fkey REFERENCES "user" (id) ON DELETE CASCADE,
    provider_id text NOT NULL,
    account_id text NOT NULL,
    access_token text,
    refresh_token text,
    id_token text,
    access_token_expires_at timestamptz,
    refresh_token_expires_at timestamptz,
    scope text,
    password text,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT account_provider_key UNIQUE (provider_id, account_id)
);
CREATE INDEX account_user_idx ON account (user_id);

CREATE TABLE verification (
    id uuid CONSTRAINT verification_pkey PRIMARY KEY DEFAULT gen_random_uuid(),
    identifier text NOT NULL,
    value text NOT NULL,
    expires_at timestamptz NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX verification_identifier_idx ON verification (identifier);

-- -------------------------------------------------------------------------------------------- conversations

CREATE TABLE conversation (
    id uuid CONSTRAINT conversation_pkey PRIMARY KEY DEFAULT gen_random_uuid(),
    title text CONSTRAINT conversation_title_length CHECK (char_length(title) BETWEEN 1 AND 255),
    description text CONSTRAINT conversation_description_length CHECK (char_length(description) <= 1000),
    type text NOT NULL DEFAULT 'direct'
        CONSTRAINT conversation_type_known CHECK (type IN ('direct', 'group', 'channel', 'assistant')),
    is_public boolean NOT NULL DEFAULT false,
    invite_code text CONSTRAINT conversation_invite_code_key UNIQUE
        CONSTRAINT conversation_invite_code_length CHECK (char_length(invite_code) BETWEEN 1 AND 50),
    max_participants integer CONSTRAINT conversation_max_participants_positive CHECK (max_participants > 0),
    -- False once everyone has left: nobody can come back, or there would be nobody who owns it.
    is_active boolean NOT NULL DEFAULT true,
    is_archived boolean NOT NULL DEFAULT false,
    is_deleted boolean NOT NULL DEFAULT false,
    created_by uuid NOT NULL CONSTRAINT conversation_created_by_fkey REFERENCES "user" (id),
    last_message_at timestamptz,
    last_activity_at timestamptz NOT NULL DEFAULT now(),
    -- Both counts are kept by the statements that change the rows they count.
    message_count integer NOT NULL DEFAULT 0,
    participant_count integer NOT NULL DEFAULT 0,
    -- protocol/values.py has their type, ConversationSettings. Those that are as usual are left out.
    settings jsonb NOT NULL DEFAULT '{}',
    -- The pair of a direct conversation, in order: what makes it one per pair.
    direct_low uuid CONSTRAINT conversation_direct_low_fkey REFERENCES "user" (id),
    direct_high uuid CONSTRAINT conversation_direct_high_fkey REFERENCES "user" (id),
    -- The clock (see above), its value when who may do what last changed (a writer whose snapshot is older
    -- than that starts again), and its value when this row's own settings last changed.
    version bigint NOT NULL DEFAULT 0,
    access_version bigint NOT NULL DEFAULT 0,
    settings_version bigint NOT NULL DEFAULT 0,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    image text CONSTRAINT conversation_image_length CHECK (char_length(image) BETWEEN 1 AND 2000),
    -- Until when the invite code opens, and how often yet; no limit if null.
    invite_expires_at timestamptz,
    invite_uses_left integer CONSTRAINT conversation_invite_uses_left_range CHECK (invite_uses_left >= 0),
    -- The last entry of its audit log that was deleted for its age: the next one goes on from there.
    audit_number bigint NOT NULL DEFAULT 0,
    audit_hash bytea NOT NULL DEFAULT '',
    -- Over, perhaps with drafts and invitations that no query shows. A job ends those (server/queries/remains.py).
    has_remains boolean NOT NULL DEFAULT false,
    CONSTRAINT conversation_direct_pair_key UNIQUE (direct_low, direct_high),
    CONSTRAINT conversation_direct_has_pair
        CHECK ((type = 'direct') = (direct_low IS NOT NULL) AND direct_low < direct_high IS NOT false),
    CONSTRAINT conversation_group_has_title CHECK (type NOT IN ('group', 'channel') OR title IS NOT NULL)
)
-- Each message moves the clock. With room on the page, and no index on what moves, that changes no index (HOT).
WITH (fillfactor = 70);
-- Python's hash of an id. Whoever makes ids can make thousands with the same one, and a worker keeps dictionaries of the
-- conversations that somebody takes part in (docs/decisions/0050-ids-that-collide.md).
CREATE FUNCTION id_hash(id uuid) RETURNS bigint LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN (
        substring(('x' || replace(id::text, '-', ''))::bit(128) FROM 1 FOR 6)::bit(6)::integer::bigint
        + substring(('x' || replace(id::text, '-', ''))::bit(128) FROM 7 FOR 61)::bit(61)::bigint
        + substring(('x' || replace(id::text, '-', ''))::bit(128) FROM 68 FOR 61)::bit(61)::bigint
    ) % 2305843009213693951;
CREATE UNIQUE INDEX conversation_id_hash_key ON conversation (id_hash(id));
-- With the time, so that the conversations of a day are counted without those of all years.
CREATE INDEX conversation_created_by_idx ON conversation (created_by, created_at);
CREATE INDEX conversation_remains_idx ON conversation (id) WHERE has_remains;
CREATE INDEX conversation_words_idx ON conversation
    USING gin (to_tsvector('simple', unpunctuated(coalesce(title, '') || ' ' || coalesce(description, ''))))
    WHERE is_public;

CREATE TABLE conversation_participant (
    id uuid CONSTRAINT conversation_participant_pkey PRIMARY KEY DEFAULT gen_random_uuid(),
    conversation_id uuid NOT NULL
        CONSTRAINT conversation_participant_conversation_fkey REFERENCES conversation (id) ON DELETE CASCADE,
    user_id uuid NOT NULL
        CONSTRAINT conversation_participant_user_fkey REFERENCES "user" (id) ON DELETE CASCADE,
    role text NOT NULL DEFAULT 'member' CONSTRAINT conversation_participant_role_known
        CHECK (role IN ('owner', 'admin', 'moderator', 'member', 'guest')),
    status text NOT NULL DEFAULT 'active' CONSTRAINT conversation_participant_status_known
        CHECK (status IN ('active', 'invited', 'declined', 'left', 'removed', 'banned')),
    -- Permissions granted beyond those that the role brings (see can()).
    can_add_members boolean NOT NULL DEFAULT false,
    can_remove_members boolean NOT NULL DEFAULT false,
    can_edit_conversation boolean NOT NULL DEFAULT false,
    can_delete_messages boolean NOT NULL DEFAULT false,
    can_pin_messages boolean NOT NULL DEFAULT false,
    notifications_enabled boolean NOT NULL DEFAULT true,
    muted_until timestamptz,
    is_muted boolean NOT NULL DEFAULT false,
    -- The read position. Unread and read-by counts are derived from it; no row is written when others send.
    last_read_message_id uuid,
    last_read_version bigint NOT NULL DEFAULT 0,
    last_read_at timestamptz,
    joined_at timestamptz NOT NULL DEFAULT now(),
    left_at timestamptz,
    invited_by uuid CONSTRAINT conversation_participant_invited_by_fkey REFERENCES "user" (id),
    version bigint NOT NULL DEFAULT 0,
    -- The clock when they last joined: what was sent before may be hidden from them (see visible_after()).
    joined_version bigint NOT NULL DEFAULT 0,
    -- The user's own clock when this row last changed in a way that is theirs alone: invited, preferences.
    user_version bigint NOT NULL DEFAULT 0,
    pin_order integer,
    is_hidden boolean NOT NULL DEFAULT false,
    notification_level text NOT NULL DEFAULT 'all' CONSTRAINT conversation_participant_notification_level_known
        CHECK (notification_level IN ('all', 'mentions', 'none')),
    -- Kept only where slow mode has people wait.
    last_sent_at timestamptz,
    -- The newest message that one of their clients has taken in.
    delivered_message_id uuid,
    delivered_version bigint NOT NULL DEFAULT 0,
    delivered_at timestamptz,
    -- From where on they want it to count as unread, for themselves alone, whatever they have read.
    unread_from_id uuid,
    unread_from_version bigint,
    -- The clock when they last left or were removed; later invitations and bans do not move it. See gone_version().
    left_version bigint NOT NULL DEFAULT 0,
    CONSTRAINT conversation_participant_key UNIQUE (conversation_id, user_id)
);
-- "participant_conversation_idx" of the specification is the unique constraint above.
-- Not "WHERE status = 'active'": a plan made while the table is small might walk all of a partial index.
-- With the conversation, so that whichever index is taken to find somebody in a conversation finds one row: by the user
-- alone, all conversations of somebody who is in thousands would be looked through.
CREATE INDEX participant_user_idx ON conversation_participant (user_id, conversation_id);
-- What was told to a user alone, by their own clock.
CREATE INDEX participant_user_version_idx ON conversation_participant (user_id, user_version) WHERE user_version > 0;
CREATE INDEX participant_version_idx ON conversation_participant (conversation_id, version);
-- Those who left and were invited or banned later: the clock of what the others may know of them.
CREATE INDEX participant_left_version_idx ON conversation_participant (conversation_id, left_version)
    WHERE left_version > 0 AND left_version < version;
-- Invitations that nobody has answered, by who has them and by who sent them.
CREATE INDEX participant_invited_idx ON conversation_participant (user_id) WHERE status = 'invited';
CREATE INDEX participant_invited_by_idx ON conversation_participant (invited_by) WHERE status = 'invited';
-- By the conversation, when it is over: by an expression, so that no other statement is planned along it.
CREATE INDEX participant_invited_to_idx ON conversation_participant
    ((CASE WHEN status = 'invited' THEN conversation_id END))
    WHERE (CASE WHEN status = 'invited' THEN conversation_id END) IS NOT NULL;
-- Who follows an owner that leaves. By an expression, so that no other statement is planned along it: with the status as
-- a column, or as a condition, one made for a small table would walk all of the index.
CREATE INDEX participant_heir_idx ON conversation_participant
    ((CASE WHEN status = 'active' THEN role END), conversation_id, joined_at, user_id);

-- --------------------------------------------------------------------------------------------- messages

CREATE TABLE message (
    id uuid CONSTRAINT message_pkey PRIMARY KEY DEFAULT gen_random_uuid(),
    conversation_id uuid NOT NULL
        CONSTRAINT message_conversation_fkey REFERENCES conversation (id) ON DELETE CASCADE,
    sender_id uuid NOT NULL CONSTRAINT message_sender_fkey REFERENCES "user" (id),
    content text NOT NULL CONSTRAINT message_content_length CHECK (char_length(content) <= 10000),
    content_type text NOT NULL DEFAULT 'text' CONSTRAINT message_content_type_known CHECK (content_type IN
        ('text', 'image', 'file', 'audio', 'video', 'code', 'system', 'poll', 'location')),
    formatted_content text CONSTRAINT message_formatted_length CHECK (char_length(formatted_content) <= 15000),
    mentions uuid[] NOT NULL DEFAULT '{}',
    hashtags text[] NOT NULL DEFAULT '{}',
    -- Counts by emoji, kept by the statement that changes message_reaction.
    reactions jsonb NOT NULL DEFAULT '{}',
    thread_root_id uuid CONSTRAINT message_thread_root_fkey REFERENCES message (id),
    parent_message_id uuid CONSTRAINT message_parent_fkey REFERENCES message (id),
    -- The place of a reply in its thread, from 1 without holes; on the root, that of its newest reply.
    thread_order integer NOT NULL DEFAULT 0,
    -- Replies that are not deleted, on the root of the thread.
    reply_count integer NOT NULL DEFAULT 0,
    status text NOT NULL DEFAULT 'sent' CONSTRAINT message_status_known
        CHECK (status IN ('sending', 'sent', 'delivered', 'read', 'failed', 'edited', 'deleted')),
    edited_at timestamptz,
    edited_by uuid CONSTRAINT message_edited_by_fkey REFERENCES "user" (id),
    is_pinned boolean NOT NULL DEFAULT false,
    pinned_at timestamptz,
    pinned_by uuid CONSTRAINT message_pinned_by_fkey REFERENCES "user" (id),
    is_system_message boolean NOT NULL DEFAULT false,
    system_message_type text CONSTRAINT message_system_type_known CHECK (system_message_type IN
        ('join', 'leave', 'add_member', 'remove_member', 'title_change', 'settings_change')),
    is_moderated boolean NOT NULL DEFAULT false,
    moderation_reason text CONSTRAINT message_moderation_reason_length
        CHECK (char_length(moderation_reason) <= 500),
    moderated_at timestamptz,
    moderated_by uuid CONSTRAINT message_moderated_by_fkey REFERENCES "user" (id),
    is_deleted boolean NOT NULL DEFAULT false,
    deleted_at timestamptz,
    deleted_by uuid CONSTRAINT message_deleted_by_fkey REFERENCES "user" (id),
    token_count integer NOT NULL DEFAULT 0,
    model text CONSTRAINT message_model_length CHECK (char_length(model) <= 255),
    metadata jsonb,
    -- The clock when the message was sent, which is its place in the conversation, and when it last changed.
    sent_version bigint NOT NULL,
    version bigint NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    -- What content types other than text consist of: protocol/payloads.py has their forms.
    payload jsonb,
    -- Those mentioned by what they are: 'everyone', 'here', or a role.
    loud_mentions text[] NOT NULL DEFAULT '{}',
    -- A reply that stands in the conversation as well, and counts there.
    also_in_conversation boolean NOT NULL DEFAULT false,
    quoted_message_id uuid CONSTRAINT message_quoted_fkey REFERENCES message (id),
    -- From where a message was forwarded: of another conversation, so that there is no constraint.
    forwarded_from_id uuid,
    forwarded_sender_id uuid CONSTRAINT message_forwarded_sender_fkey REFERENCES "user" (id),
    -- The votes for each option, and of how many people, kept by the statement that changes poll_vote.
    poll_counts integer[],
    poll_voters integer NOT NULL DEFAULT 0,
    poll_closed_at timestamptz,
    -- When its words go, where the conversation's settings say so; null afterwards.
    expires_at timestamptz,
    link_preview jsonb,
    -- Deleted, with reactions or votes that no query shows. A job deletes those (server/queries/remains.py).
    has_remains boolean NOT NULL DEFAULT false
);
-- History in pages. By the clock, not by created_at: two messages can share an instant, never a version.
CREATE UNIQUE INDEX message_conversation_created_idx ON message (conversation_id, sent_version);
CREATE INDEX message_conversation_version_idx ON message (conversation_id, version);
-- With the id, so that what somebody said can be read in pages.
CREATE INDEX message_sender_idx ON message (sender_id, id);
CREATE INDEX message_thread_root_idx ON message (thread_root_id, thread_order) WHERE thread_root_id IS NOT NULL;
-- What stands in the conversation itself, without the replies in its threads: what unread counts go by.
CREATE INDEX message_timeline_idx ON message (conversation_id, sent_version)
    WHERE thread_root_id IS NULL OR also_in_conversation;
CREATE INDEX message_pinned_idx ON message (conversation_id, pinned_at) WHERE is_pinned;
CREATE INDEX message_expires_idx ON message (expires_at) WHERE expires_at IS NOT NULL;
CREATE INDEX message_remains_idx ON message (id) WHERE has_remains;
-- Messages that mention everyone, or a role, which the feed reads the latest first, conversation by conversation.
CREATE INDEX message_loud_idx ON message (conversation_id, created_at, id) WHERE loud_mentions <> '{}';

-- One row for each user and emoji on a message; taken back, it stays as its own tombstone.
CREATE TABLE message_reaction (
    message_id uuid NOT NULL CONSTRAINT message_reaction_message_fkey REFERENCES message (id) ON DELETE CASCADE,
    user_id uuid NOT NULL CONSTRAINT message_reaction_user_fkey REFERENCES "user" (id) ON DELETE CASCADE,
    emoji text NOT NULL CONSTRAINT message_reaction_emoji_length CHECK (char_length(emoji) BETWEEN 1 AND 32),
    conversation_id uuid NOT NULL
        CONSTRAINT message_reaction_conversation_fkey REFERENCES conversation (id) ON DELETE CASCADE,
    is_removed boolean NOT NULL DEFAULT false,
    version bigint NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    -- Whose message it is, which never changes: the feed asks by it.
    author_id uuid NOT NULL CONSTRAINT message_reaction_author_fkey REFERENCES "user" (id),
    CONSTRAINT message_reaction_pkey PRIMARY KEY (message_id, user_id, emoji)
);
CREATE INDEX message_reaction_author_idx ON message_reaction (author_id, created_at) WHERE NOT is_removed;
CREATE INDEX message_reaction_version_idx ON message_reaction (conversation_id, version);
-- With the rest of the key, so that a person's own data is read in pages.
CREATE INDEX message_reaction_user_idx ON message_reaction (user_id, message_id, emoji);

-- What a message said before each edit, and before it was deleted: a deleted message keeps its place in
-- the conversation and loses its words. An edit's id is the client's, so that a repeated edit is one edit.
CREATE TABLE message_edit (
    id uuid CONSTRAINT message_edit_pkey PRIMARY KEY,
    message_id uuid NOT NULL CONSTRAINT message_edit_message_fkey REFERENCES message (id) ON DELETE CASCADE,
    content text NOT NULL,
    formatted_content text,
    edited_by uuid NOT NULL CONSTRAINT message_edit_edited_by_fkey REFERENCES "user" (id),
    edited_at timestamptz NOT NULL DEFAULT now(),
    version bigint NOT NULL,
    conversation_id uuid NOT NULL
        CONSTRAINT message_edit_conversation_fkey REFERENCES conversation (id) ON DELETE CASCADE
);
CREATE INDEX message_edit_message_idx ON message_edit (message_id, version);

-- One row for each voter of a poll, so that nobody votes twice; without options, the vote was withdrawn.
CREATE TABLE poll_vote (
    message_id uuid NOT NULL CONSTRAINT poll_vote_message_fkey REFERENCES message (id) ON DELETE CASCADE,
    user_id uuid NOT NULL CONSTRAINT poll_vote_user_fkey REFERENCES "user" (id) ON DELETE CASCADE,
    conversation_id uuid NOT NULL
        CONSTRAINT poll_vote_conversation_fkey REFERENCES conversation (id) ON DELETE CASCADE,
    -- The places of the options in the payload, from 0, in order.
    options integer[] NOT NULL,
    version bigint NOT NULL,
    voted_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT poll_vote_pkey PRIMARY KEY (message_id, user_id)
);
CREATE INDEX poll_vote_version_idx ON poll_vote (conversation_id, version);
CREATE INDEX poll_vote_user_idx ON poll_vote (user_id, message_id);

-- Who follows a thread: whoever began it or replied in it, or wants to, until they say otherwise.
CREATE TABLE thread_follow (
    root_id uuid NOT NULL CONSTRAINT thread_follow_root_fkey REFERENCES message (id) ON DELETE CASCADE,
    user_id uuid NOT NULL CONSTRAINT thread_follow_user_fkey REFERENCES "user" (id) ON DELETE CASCADE,
    conversation_id uuid NOT NULL
        CONSTRAINT thread_follow_conversation_fkey REFERENCES conversation (id) ON DELETE CASCADE,
    is_following boolean NOT NULL DEFAULT true,
    has_replied boolean NOT NULL DEFAULT false,
    -- The thread_order of the last reply that they have read.
    last_read_order integer NOT NULL DEFAULT 0,
    user_version bigint NOT NULL DEFAULT 0,
    CONSTRAINT thread_follow_pkey PRIMARY KEY (root_id, user_id)
);
-- With the root, whose id tells when the thread began, so that the newest ones are read without all others.
CREATE INDEX thread_follow_user_idx ON thread_follow (user_id, is_following, root_id);
-- Those rows that were told of: not each that a reply has made.
CREATE INDEX thread_follow_version_idx ON thread_follow (user_id, user_version) WHERE user_version > 0;

-- What somebody has put aside; taken back, it stays as its own tombstone.
CREATE TABLE message_star (
    user_id uuid NOT NULL CONSTRAINT message_star_user_fkey REFERENCES "user" (id) ON DELETE CASCADE,
    message_id uuid NOT NULL CONSTRAINT message_star_message_fkey REFERENCES message (id) ON DELETE CASCADE,
    conversation_id uuid NOT NULL
        CONSTRAINT message_star_conversation_fkey REFERENCES conversation (id) ON DELETE CASCADE,
    is_removed boolean NOT NULL DEFAULT false,
    user_version bigint NOT NULL,
    starred_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT message_star_pkey PRIMARY KEY (user_id, message_id)
);
CREATE INDEX message_star_user_idx ON message_star (user_id, starred_at) WHERE NOT is_removed;
CREATE INDEX message_star_version_idx ON message_star (user_id, user_version);
CREATE INDEX message_star_removed_idx ON message_star (user_id, user_version) WHERE is_removed;

-- What somebody has begun to write: one in each conversation, on all of their devices; empty, there is none.
CREATE TABLE draft (
    user_id uuid NOT NULL CONSTRAINT draft_user_fkey REFERENCES "user" (id) ON DELETE CASCADE,
    conversation_id uuid NOT NULL
        CONSTRAINT draft_conversation_fkey REFERENCES conversation (id) ON DELETE CASCADE,
    content text NOT NULL CONSTRAINT draft_content_length CHECK (char_length(content) <= 10000),
    user_version bigint NOT NULL,
    updated_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT draft_pkey PRIMARY KEY (user_id, conversation_id)
);
-- Those of a conversation that was deleted, which are emptied.
CREATE INDEX draft_conversation_idx ON draft (conversation_id, user_id) WHERE content <> '';
CREATE INDEX draft_version_idx ON draft (user_id, user_version) WHERE user_version > 0;

-- Messages that wait for their time. The id is the message's: sent twice, it is stored once.
CREATE TABLE scheduled_message (
    id uuid CONSTRAINT scheduled_message_pkey PRIMARY KEY,
    sender_id uuid NOT NULL CONSTRAINT scheduled_message_sender_fkey REFERENCES "user" (id) ON DELETE CASCADE,
    conversation_id uuid NOT NULL
        CONSTRAINT scheduled_message_conversation_fkey REFERENCES conversation (id) ON DELETE CASCADE,
    -- What will be said (protocol/values.py, Words).
    words jsonb NOT NULL,
    send_at timestamptz NOT NULL,
    status text NOT NULL DEFAULT 'waiting' CONSTRAINT scheduled_message_status_known
        CHECK (status IN ('waiting', 'sent', 'failed', 'cancelled')),
    -- Why it failed, in the words of the refusal.
    problem text,
    -- When a worker took it up; should that die, another one does after a while.
    claimed_at timestamptz,
    user_version bigint NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    -- The time of the next try, after slow mode or a busy server put it off. Nobody has claimed it meanwhile.
    not_before timestamptz
);
-- What is due, in order, to go on after the last one of a page.
CREATE INDEX scheduled_message_turn_idx ON scheduled_message (send_at, id) WHERE status = 'waiting';
CREATE INDEX scheduled_message_version_idx ON scheduled_message (sender_id, user_version) WHERE user_version > 0;
CREATE INDEX scheduled_message_sender_idx ON scheduled_message (sender_id, send_at);
-- What still waits of one sender, beside all that is over.
CREATE INDEX scheduled_message_waiting_idx ON scheduled_message (sender_id, send_at) WHERE status = 'waiting';
-- What is over, and deleted after a while.
CREATE INDEX scheduled_message_over_idx ON scheduled_message (send_at) WHERE status <> 'waiting';

-- Where notifications are pushed to: a browser's, which ends with the session that it was registered in.
CREATE TABLE push_endpoint (
    id uuid CONSTRAINT push_endpoint_pkey PRIMARY KEY DEFAULT gen_random_uuid(),
    user_id uuid NOT NULL CONSTRAINT push_endpoint_user_fkey REFERENCES "user" (id) ON DELETE CASCADE,
    session_id uuid NOT NULL CONSTRAINT push_endpoint_session_fkey REFERENCES session (id) ON DELETE CASCADE,
    endpoint text NOT NULL CONSTRAINT push_endpoint_key UNIQUE
        CONSTRAINT push_endpoint_length CHECK (char_length(endpoint) BETWEEN 1 AND 2000),
    -- The browser's keys, which what is pushed is encrypted with (RFC 8291), in base64url.
    p256dh text NOT NULL,
    auth text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX push_endpoint_user_idx ON push_endpoint (user_id);
CREATE INDEX push_endpoint_session_idx ON push_endpoint (session_id);

-- What can be searched for in each message that has words, written by the statement that writes the message. A table of
-- its own, so that a reaction or a reply, which change the message's row, leave the index of words alone.
CREATE TABLE message_search (
    message_id uuid CONSTRAINT message_search_pkey PRIMARY KEY,
    conversation_id uuid NOT NULL,
    created_at timestamptz NOT NULL,
    words tsvector NOT NULL
);
-- What was added last waits in a list. Whoever finds it full sorts it in, under the lock of a conversation: so it is
-- large, and a job empties it (server/queries/search_index.py).
CREATE INDEX message_search_words_idx ON message_search USING gin (words) WITH (gin_pending_list_limit = 32768);

CREATE TABLE attachment (
    id uuid CONSTRAINT attachment_pkey PRIMARY KEY DEFAULT gen_random_uuid(),
    message_id uuid NOT NULL CONSTRAINT attachment_message_fkey REFERENCES message (id) ON DELETE CASCADE,
    uploaded_by uuid NOT NULL CONSTRAINT attachment_uploaded_by_fkey REFERENCES "user" (id),
    filename text NOT NULL CONSTRAINT attachment_filename_length CHECK (char_length(filename) BETWEEN 1 AND 255),
    original_filename text NOT NULL CONSTRAINT attachment_original_filename_length
        CHECK (char_length(original_filename) BETWEEN 1 AND 255),
    mime_type text NOT NULL CONSTRAINT attachment_mime_type_length CHECK (char_length(mime_type) BETWEEN 1 AND 255),
    file_size integer NOT NULL
        CONSTRAINT attachment_file_size_range CHECK (file_size BETWEEN 1 AND 100 * 1024 * 1024),
    storage_provider text NOT NULL DEFAULT 'local' CONSTRAINT attachment_storage_provider_known
        CHECK (storage_provider IN ('local', 's3', 'gcs', 'azure', 'cloudinary')),
    storage_key text NOT NULL
        CONSTRAINT attachment_storage_key_length CHECK (char_length(storage_key) BETWEEN 1 AND 1000),
    storage_url text,
    metadata jsonb,
    thumbnail_url text,
    preview_url text,
    content_description text CONSTRAINT attachment_description_length
        CHECK (char_length(content_description) <= 1000),
    extracted_text text CONSTRAINT attachment_extracted_text_length CHECK (char_length(extracted_text) <= 50000),
    tags text[] NOT NULL DEFAULT '{}',
    is_public boolean NOT NULL DEFAULT false,
    access_token text,
    expires_at timestamptz,
    is_scanned boolean NOT NULL DEFAULT false,
    scan_result text CONSTRAINT attachment_scan_result_known
        CHECK (scan_result IN ('clean', 'infected', 'suspicious', 'pending')),
    scan_details jsonb,
    processing_status text NOT NULL DEFAULT 'pending' CONSTRAINT attachment_processing_status_known
        CHECK (processing_status IN ('pending', 'processing', 'completed', 'failed')),
    processing_error text CONSTRAINT attachment_processing_error_length
        CHECK (char_length(processing_error) <= 1000),
    download_count integer NOT NULL DEFAULT 0,
    last_accessed_at timestamptz,
    is_deleted boolean NOT NULL DEFAULT false,
    deleted_at timestamptz,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX attachment_message_idx ON attachment (message_id);
CREATE INDEX attachment_uploaded_by_idx ON attachment (uploaded_by);

-- ---------------------------------------------------------------------------------------- relationships

CREATE TABLE user_relationship (
    id uuid CONSTRAINT user_relationship_pkey PRIMARY KEY DEFAULT gen_random_uuid(),
    from_user_id uuid NOT NULL CONSTRAINT user_relationship_from_fkey REFERENCES "user" (id) ON DELETE CASCADE,
    to_user_id uuid NOT NULL CONSTRAINT user_relationship_to_fkey REFERENCES "user" (id) ON DELETE CASCADE,
    type text NOT NULL CONSTRAINT user_relationship_type_known CHECK (type IN ('friend', 'block', 'follow', 'mute')),
    status text NOT NULL DEFAULT 'pending' CONSTRAINT user_relationship_status_known
        CHECK (status IN ('pending', 'accepted', 'rejected', 'active', 'inactive')),
    request_message text CONSTRAINT user_relationship_request_length CHECK (char_length(request_message) <= 500),
    response_message text CONSTRAINT user_relationship_response_length CHECK (char_length(response_message) <= 500),
    can_see_online_status boolean NOT NULL DEFAULT true,
    can_send_messages boolean NOT NULL DEFAULT true,
    can_see_profile boolean NOT NULL DEFAULT true,
    notifications_enabled boolean NOT NULL DEFAULT true,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    accepted_at timestamptz,
    -- Both users' own clocks when this last changed.
    from_version bigint NOT NULL DEFAULT 0,
    to_version bigint NOT NULL DEFAULT 0,
    CONSTRAINT user_relationship_key UNIQUE (from_user_id, to_user_id, type),
    CONSTRAINT user_relationship_not_self CHECK (from_user_id <> to_user_id)
);
-- What changed for either user since a number of their own clock. Partial, so that nothing else is looked up by them.
CREATE INDEX user_relationship_from_version_idx ON user_relationship (from_user_id, from_version) WHERE from_version > 0;
CREATE INDEX user_relationship_to_version_idx ON user_relationship (to_user_id, to_version) WHERE to_version > 0;
-- Who hides from a user: not all who follow them.
CREATE INDEX user_relationship_hiding_idx ON user_relationship (to_user_id)
    WHERE NOT can_see_online_status OR (type = 'block' AND status = 'active');
CREATE INDEX user_relationship_to_idx ON user_relationship (to_user_id, type, from_user_id);
-- Friend requests without an answer, for the feed.
CREATE INDEX user_relationship_pending_idx ON user_relationship (to_user_id, updated_at, id)
    WHERE type = 'friend' AND status = 'pending';
-- What has ended and says nothing any more, and is deleted after a while.
CREATE INDEX user_relationship_over_idx ON user_relationship (updated_at)
    WHERE status = 'inactive' AND can_see_online_status AND can_send_messages AND can_see_profile
        AND notifications_enabled;

-- How often somebody has tried to reach somebody else, or changed rows of theirs, since `began_at`, by kind. Rows older than a day are deleted.
CREATE TABLE approach (
    from_user_id uuid NOT NULL CONSTRAINT approach_from_fkey REFERENCES "user" (id) ON DELETE CASCADE,
    to_user_id uuid NOT NULL CONSTRAINT approach_to_fkey REFERENCES "user" (id) ON DELETE CASCADE,
    kind text NOT NULL CONSTRAINT approach_kind_known CHECK (
        kind IN ('add', 'invite', 'friend', 'follow', 'block', 'mute', 'switch')
    ),
    made integer NOT NULL DEFAULT 1,
    began_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT approach_pkey PRIMARY KEY (from_user_id, to_user_id, kind)
);
CREATE INDEX approach_began_idx ON approach (began_at);
CREATE INDEX approach_to_idx ON approach (to_user_id);

-- ------------------------------------------------------------------------------------------- moderation

-- One for each message and reporter: said again, it is the same report.
CREATE TABLE report (
    id uuid CONSTRAINT report_pkey PRIMARY KEY DEFAULT gen_random_uuid(),
    conversation_id uuid NOT NULL
        CONSTRAINT report_conversation_fkey REFERENCES conversation (id) ON DELETE CASCADE,
    message_id uuid NOT NULL CONSTRAINT report_message_fkey REFERENCES message (id) ON DELETE CASCADE,
    reporter_id uuid NOT NULL CONSTRAINT report_reporter_fkey REFERENCES "user" (id),
    reason text NOT NULL CONSTRAINT report_reason_length CHECK (char_length(reason) BETWEEN 1 AND 500),
    status text NOT NULL DEFAULT 'open'
        CONSTRAINT report_status_known CHECK (status IN ('open', 'upheld', 'dismissed')),
    resolved_by uuid CONSTRAINT report_resolved_by_fkey REFERENCES "user" (id),
    resolved_at timestamptz,
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT report_key UNIQUE (message_id, reporter_id)
);
CREATE INDEX report_conversation_idx ON report (conversation_id, status, id);
CREATE INDEX report_open_idx ON report (id) WHERE status = 'open';
CREATE INDEX report_reporter_idx ON report (reporter_id, created_at);

-- Who used what power on whom. Each chain, one for each conversation and one (of zeros) for the server, is numbered
-- without holes, and each entry carries the hash of the one before: see audit_hash().
CREATE TABLE audit_entry (
    chain uuid NOT NULL,
    number bigint NOT NULL,
    -- Null: the command line.
    actor_id uuid CONSTRAINT audit_entry_actor_fkey REFERENCES "user" (id),
    action text NOT NULL CONSTRAINT audit_entry_action_length CHECK (char_length(action) BETWEEN 1 AND 50),
    user_id uuid,
    message_id uuid,
    details jsonb NOT NULL DEFAULT '{}',
    created_at timestamptz NOT NULL DEFAULT now(),
    previous_hash bytea NOT NULL,
    hash bytea NOT NULL,
    CONSTRAINT audit_entry_pkey PRIMARY KEY (chain, number)
);
CREATE INDEX audit_entry_actor_idx ON audit_entry (actor_id, chain, number);
-- Those that are to be deleted; the server's own log stays.
CREATE INDEX audit_entry_created_idx ON audit_entry (created_at) WHERE chain <> '00000000-0000-0000-0000-000000000000';

-- ------------------------------------------------------------------------------------- about this database

-- One row. A new epoch tells every client that positions from before mean nothing here (a restored backup).
CREATE TABLE database_epoch (
    is_only boolean CONSTRAINT database_epoch_pkey PRIMARY KEY DEFAULT true
        CONSTRAINT database_epoch_one_row CHECK (is_only),
    epoch uuid NOT NULL DEFAULT gen_random_uuid()
);
INSERT INTO database_epoch DEFAULT VALUES;

-- Keys that the server makes for itself once: 'vapid' signs what is pushed (RFC 8292), and is the P-256 private key.
CREATE TABLE server_key (
    name text CONSTRAINT server_key_pkey PRIMARY KEY,
    value text NOT NULL
);

-- --------------------------------------------------------------------------------------------- rules and forms

-- What a role brings, in one place: may a participant with this role and this grant do it?
-- `needed` is the least role that has the permission without a grant.
CREATE FUNCTION role_rank(role text) RETURNS integer LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN array_position(ARRAY['guest', 'member', 'moderator', 'admin', 'owner'], role);

CREATE FUNCTION can(role text, needed text, granted boolean) RETURNS boolean LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN granted OR role_rank(role) >= role_rank(needed);

-- The messages that a participant may see are those sent after this version.
CREATE FUNCTION visible_after(c conversation, p conversation_participant) RETURNS bigint
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN CASE WHEN c.settings ->> 'history' = 'from_joining' THEN p.joined_version ELSE 0 END;

-- Whether a participant may send now: not while it is archived, below the role that the settings ask for, and in slow
-- mode, which moderators are free of, only with `has_waited`, which whoever made sure of it says.
CREATE FUNCTION may_send(c conversation, role text, has_waited boolean) RETURNS boolean
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN NOT c.is_archived AND (c.settings = '{}' OR (
        role_rank(role) >= role_rank(coalesce(c.settings ->> 'send_role', 'guest'))
        AND (NOT c.settings ? 'slow_mode_seconds' OR has_waited OR role_rank(role) >= role_rank('moderator'))
    ));

-- Whose messages somebody does not want to hear of. Unread counts, the feed and notifications leave them out.
CREATE FUNCTION silenced(by_whom uuid) RETURNS uuid[] LANGUAGE sql STABLE PARALLEL SAFE
    RETURN ARRAY(
        SELECT r.to_user_id FROM user_relationship r
        WHERE r.from_user_id = by_whom AND r.type IN ('block', 'mute') AND r.status = 'active'
    );

-- Whether a participant may see what a message of that sender said before.
CREATE FUNCTION shows_edits(c conversation, p conversation_participant, sender uuid) RETURNS boolean
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN p.user_id = sender OR CASE coalesce(c.settings ->> 'edits_visible_to', 'everyone')
        WHEN 'everyone' THEN true
        WHEN 'moderators' THEN can(p.role, 'moderator', p.can_delete_messages)
        ELSE false END;

-- Words with something in front of each, none of which has a space in it. Without a subquery, so that it costs nothing
-- where there are none, as in most messages.
CREATE FUNCTION prefixed(prefix text, words text[]) RETURNS text[] LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN CASE WHEN words = '{}' THEN '{}' ELSE string_to_array(prefix || array_to_string(words, ' ' || prefix), ' ') END;

-- What a message is found by: its words in the language of the connection (OPENCHAT_SEARCH_LANGUAGE), and beside them
-- where it was said (c:), who is mentioned (m:) and its hashtags (h:), so that one index narrows down all of them.
CREATE FUNCTION search_words(conversation uuid, content text, payload jsonb, mentions uuid[], loud text[], hashtags text[])
    RETURNS tsvector LANGUAGE sql STABLE PARALLEL SAFE
    RETURN to_tsvector(unpunctuated(concat_ws(' ', content, payload ->> 'name', payload ->> 'alt',
            payload -> 'options')))
        || array_to_tsvector(ARRAY['c:' || conversation] || prefixed('m:', mentions::text[]) || prefixed('m:', loud)
            || prefixed('h:', hashtags));

-- A row as it goes over the wire (protocol/values.py has the same fields). What a moderator has hidden is hidden here,
-- for everyone; whoever may see it all the same gets it beside the message.
CREATE FUNCTION message_json(m message) RETURNS json LANGUAGE sql STABLE
    RETURN json_build_object(
        'id', m.id,
        'conversation_id', m.conversation_id,
        'sender_id', m.sender_id,
        'content', CASE WHEN m.is_moderated THEN '' ELSE m.content END,
        'content_type', m.content_type,
        'payload', CASE WHEN NOT m.is_moderated THEN m.payload END,
        'formatted_content', CASE WHEN NOT m.is_moderated THEN m.formatted_content END,
        'mentions', CASE WHEN m.is_moderated THEN '{}' ELSE m.mentions END,
        'loud_mentions', CASE WHEN m.is_moderated THEN '{}' ELSE m.loud_mentions END,
        'hashtags', CASE WHEN m.is_moderated THEN '{}' ELSE m.hashtags END,
        'link_preview', CASE WHEN NOT m.is_moderated THEN m.link_preview END,
        'metadata', CASE WHEN NOT m.is_moderated THEN m.metadata END,
        'reactions', m.reactions,
        'parent_message_id', m.parent_message_id,
        'thread_root_id', m.thread_root_id,
        'thread_order', m.thread_order,
        'reply_count', m.reply_count,
        'also_in_conversation', m.also_in_conversation,
        'quoted_message_id', m.quoted_message_id,
        'forwarded_from_id', m.forwarded_from_id,
        'forwarded_sender_id', m.forwarded_sender_id,
        'is_pinned', m.is_pinned,
        'pinned_at', m.pinned_at,
        'pinned_by', m.pinned_by,
        'poll_counts', m.poll_counts,
        'poll_voters', m.poll_voters,
        'poll_closed_at', m.poll_closed_at,
        'expires_at', m.expires_at,
        'edited_at', m.edited_at,
        'is_deleted', m.is_deleted,
        'deleted_at', m.deleted_at,
        'deleted_by', m.deleted_by,
        'system_message_type', m.system_message_type,
        'is_moderated', m.is_moderated,
        'moderation_reason', m.moderation_reason,
        'moderated_at', m.moderated_at,
        'moderated_by', m.moderated_by,
        'sent_version', m.sent_version,
        'version', m.version,
        'created_at', m.created_at
    );

CREATE FUNCTION conversation_json(c conversation) RETURNS json LANGUAGE sql STABLE
    RETURN json_build_object(
        'id', c.id,
        'type', c.type,
        'title', c.title,
        'description', c.description,
        'image', c.image,
        'is_public', c.is_public,
        'max_participants', c.max_participants,
        'is_archived', c.is_archived,
        'is_deleted', c.is_deleted,
        'created_by', c.created_by,
        'participant_count', c.participant_count,
        'settings', c.settings,
        'version', c.settings_version,
        'created_at', c.created_at
    );

CREATE FUNCTION participant_json(p conversation_participant) RETURNS json LANGUAGE sql STABLE
    RETURN json_build_object(
        'conversation_id', p.conversation_id,
        'user_id', p.user_id,
        'role', p.role,
        'status', p.status,
        'permissions', json_build_object(
            'can_add_members', can(p.role, 'admin', p.can_add_members),
            'can_remove_members', can(p.role, 'admin', p.can_remove_members),
            'can_edit_conversation', can(p.role, 'admin', p.can_edit_conversation),
            'can_delete_messages', can(p.role, 'moderator', p.can_delete_messages),
            'can_pin_messages', can(p.role, 'moderator', p.can_pin_messages)
        ),
        'joined_at', p.joined_at,
        'left_at', p.left_at,
        'invited_by', p.invited_by,
        'version', p.version
    );

-- The one rule of who learns what of a participation (docs/decisions/0052): `sees_participant` for whoever asks,
-- `participant_event` for what everybody is told.

-- Whether `viewer`, whose own part is `me`, sees the part of somebody and its status. An invitation and its refusal are
-- for those who may add or remove people, for whoever sent it while they take part, and for whoever got it; a ban is for
-- the first alone.
CREATE FUNCTION sees_participant(viewer uuid, me conversation_participant, them conversation_participant)
    RETURNS boolean LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN CASE
        WHEN them.status = 'active' THEN (me.status = 'active') IS TRUE
        WHEN them.status NOT IN ('invited', 'declined', 'banned') THEN false
        WHEN them.status <> 'banned' AND them.user_id = viewer THEN true
        ELSE (me.status = 'active' AND (can(me.role, 'admin', me.can_add_members OR me.can_remove_members)
            OR (them.status <> 'banned' AND them.invited_by = viewer))) IS TRUE END;

-- The clock when somebody left, and 0 if they take part or never did. Versions before 0030 kept `left_at` alone, and left
-- a `left_version` from before the last `joined_version` as it was.
CREATE FUNCTION gone_version(p conversation_participant) RETURNS bigint LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN CASE WHEN p.status = 'active' THEN 0
        WHEN p.left_version > p.joined_version THEN p.left_version
        WHEN p.status IN ('left', 'removed', 'banned') AND p.left_at IS NOT NULL THEN p.version
        ELSE 0 END;

-- That somebody takes part no more, and nothing about why.
CREATE FUNCTION participant_left_json(p conversation_participant, participant_count integer) RETURNS json
    LANGUAGE sql STABLE
    RETURN json_build_object('type', 'participant_left', 'conversation_id', p.conversation_id,
        'version', gone_version(p), 'user_id', p.user_id, 'participant_count', participant_count);

-- What everybody in the conversation is told of a participant's last change. Of somebody who did not take part before
-- it, and does not after it, that is nothing but the version.
CREATE FUNCTION participant_event(p conversation_participant, participant_count integer) RETURNS json
    LANGUAGE sql STABLE
    RETURN CASE WHEN p.status = 'active' THEN json_build_object('type', 'participant_changed',
            'conversation_id', p.conversation_id, 'version', p.version, 'participant', participant_json(p),
            'participant_count', participant_count)
        WHEN gone_version(p) = p.version THEN participant_left_json(p, participant_count)
        ELSE json_build_object('type', 'outsiders_changed', 'conversation_id', p.conversation_id,
            'version', p.version) END;

CREATE FUNCTION preferences_json(p conversation_participant) RETURNS json LANGUAGE sql STABLE
    RETURN json_build_object(
        'pin_order', p.pin_order,
        'is_hidden', p.is_hidden,
        'is_muted', p.is_muted,
        'muted_until', p.muted_until,
        'notification_level', p.notification_level,
        'unread_from_id', p.unread_from_id
    );

CREATE FUNCTION scheduled_json(s scheduled_message) RETURNS json LANGUAGE sql STABLE
    RETURN json_build_object(
        'message_id', s.id,
        'conversation_id', s.conversation_id,
        'words', s.words,
        'send_at', s.send_at,
        'status', s.status,
        'problem', s.problem,
        'created_at', s.created_at,
        'not_before', s.not_before
    );

CREATE FUNCTION thread_json(t thread_follow) RETURNS json LANGUAGE sql STABLE
    RETURN json_build_object(
        'conversation_id', t.conversation_id,
        'root_id', t.root_id,
        'is_following', t.is_following,
        'last_read_order', t.last_read_order
    );

-- What an invitation gives now: the role that it names, or the highest that whoever sent it may give now; null if they may
-- add nobody any more.
CREATE FUNCTION invited_as(p conversation_participant) RETURNS text LANGUAGE sql STABLE
    RETURN (
        SELECT CASE
            WHEN role_rank(p.role) < role_rank(i.role) THEN p.role
            WHEN i.role IN ('guest', 'member') THEN i.role
            WHEN i.role = 'moderator' THEN 'member'
            ELSE 'moderator' END
        FROM conversation_participant i
        JOIN "user" u ON u.id = i.user_id AND u.is_active AND NOT u.is_deleted
        WHERE p.status = 'invited' AND i.conversation_id = p.conversation_id AND i.user_id = p.invited_by
            AND i.status = 'active' AND can(i.role, 'admin', i.can_add_members)
    );

CREATE FUNCTION invitation_json(p conversation_participant, c conversation) RETURNS json LANGUAGE sql STABLE
    RETURN json_build_object(
        'conversation_id', c.id,
        'type', c.type,
        'title', c.title,
        'description', c.description,
        'image', c.image,
        'participant_count', c.participant_count,
        'role', coalesce(invited_as(p), p.role),
        'invited_by', p.invited_by
    );

-- As one of the two sees it.
CREATE FUNCTION relationship_json(r user_relationship, viewer uuid) RETURNS json LANGUAGE sql STABLE
    RETURN json_build_object(
        'id', r.id,
        'user_id', CASE WHEN r.from_user_id = viewer THEN r.to_user_id ELSE r.from_user_id END,
        'kind', r.type,
        'is_outgoing', r.from_user_id = viewer,
        'status', r.status,
        'request_message', r.request_message,
        'response_message', r.response_message,
        'switches', CASE WHEN r.from_user_id = viewer THEN json_build_object(
            'can_see_online_status', r.can_see_online_status,
            'can_send_messages', r.can_send_messages,
            'can_see_profile', r.can_see_profile,
            'notifications_enabled', r.notifications_enabled
        ) END,
        'created_at', r.created_at,
        'accepted_at', r.accepted_at
    );

CREATE FUNCTION me_json(u "user") RETURNS json LANGUAGE sql STABLE
    RETURN json_build_object(
        'user', json_build_object('id', u.id, 'name', u.name, 'display_name', u.display_name, 'image', u.image),
        'email', u.email,
        'email_verified', u.email_verified,
        'bio', u.bio,
        'location', u.location,
        'website', u.website,
        'status', CASE u.status WHEN 'offline' THEN 'online' ELSE u.status END,
        'custom_status', u.custom_status,
        'custom_status_until', u.custom_status_until,
        'is_private', u.is_private,
        'allow_friend_requests', u.allow_friend_requests,
        'show_online_status', u.show_online_status,
        'allow_adding', u.allow_adding,
        'is_admin', u.is_admin,
        'quiet_from', u.quiet_from,
        'quiet_until', u.quiet_until,
        'time_zone', u.time_zone,
        'feed_seen_at', u.feed_seen_at,
        'created_at', u.created_at
    );

-- The time of day in a zone, or in UTC if PostgreSQL does not know the zone: an update of PostgreSQL may drop names. An
-- error would end the statement that reads other users' rows, and quote the zone in PostgreSQL's log.
CREATE FUNCTION time_of_day(zone text) RETURNS time LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    RETURN (now() AT TIME ZONE zone)::time;
EXCEPTION WHEN invalid_parameter_value THEN
    RETURN (now() AT TIME ZONE 'UTC')::time;
END
$$;
REVOKE EXECUTE ON FUNCTION time_of_day(text) FROM PUBLIC;

-- What makes an entry of the audit log stand where it stands and say what it says.
CREATE FUNCTION audit_hash(e audit_entry) RETURNS bytea LANGUAGE sql STABLE
    RETURN sha256(convert_to(jsonb_build_array(
        e.chain, e.number, e.actor_id, e.action, e.user_id, e.message_id, e.details,
        extract(epoch FROM e.created_at), encode(e.previous_hash, 'hex')
    )::text, 'UTF8'));

-- The one table of who may see or do what to whom (protocol/privacy.py has it in words; a test compares all cells).
-- It asks what is cheap first: most people are neither private nor blocked.
-- The names in a string body are resolved when it runs. Functions that run as the owner call this one, so each table and
-- function in it is qualified, and no temporary table stands in for one. A SET clause would do the same, and cost time
-- for each direct message (docs/decisions/0035). The same holds for may_now() and are_together().
CREATE FUNCTION may(action text, viewer uuid, target uuid) RETURNS boolean LANGUAGE plpgsql STABLE AS $$
#variable_conflict use_column
DECLARE
    them record;
    theirs record;
BEGIN
    IF viewer = target THEN
        RETURN action IN ('see_face', 'see_profile', 'see_presence');
    END IF;
    SELECT u.is_active AND NOT u.is_deleted AS is_here, u.erased_at, u.is_private, u.allow_friend_requests,
        u.show_online_status, u.allow_adding
    INTO them FROM public."user" u WHERE u.id = may.target;
    IF NOT FOUND OR viewer IS NULL THEN
        RETURN false;
    ELSIF them.erased_at IS NOT NULL OR NOT them.is_here THEN
        -- What they said stays, and needs a name; without them, that is all.
        RETURN action = 'see_face' AND (them.erased_at IS NOT NULL OR public.are_together(viewer, target));
    END IF;
    SELECT coalesce(bool_or(r.type = 'block' AND r.status = 'active'), false) AS blocks,
        coalesce(bool_or(r.type = 'friend' AND r.status = 'accepted'), false) AS is_friend,
        coalesce(bool_and(r.can_see_online_status), true) AS presence,
        coalesce(bool_and(r.can_see_profile), true) AS profile,
        coalesce(bool_and(r.can_send_messages), true) AS messages
    INTO theirs FROM public.user_relationship r WHERE r.from_user_id = may.target AND r.to_user_id = may.viewer;
    IF theirs.blocks THEN
        -- In a conversation a private face is shown: if this one were hidden there, that would reveal the block.
        RETURN action = 'see_face' AND public.are_together(viewer, target);
    ELSIF (action = 'see_presence' AND NOT (them.show_online_status AND theirs.presence))
        OR (action = 'see_profile' AND NOT theirs.profile)
        OR (action IN ('write', 'invite', 'add') AND NOT theirs.messages)
        OR (action = 'add' AND NOT (theirs.is_friend AND them.allow_adding))
        OR (action = 'request_friend' AND NOT them.allow_friend_requests)
    THEN
        RETURN false;
    ELSIF action IN ('see_face', 'see_profile') THEN
        NULL;
    ELSIF EXISTS (
        SELECT FROM public.user_relationship r
        WHERE r.from_user_id = may.viewer AND r.to_user_id = may.target AND r.type = 'block' AND r.status = 'active'
    ) THEN
        RETURN false;
    END IF;
    IF NOT them.is_private OR theirs.is_friend OR action = 'request_friend' THEN
        RETURN true;
    END IF;
    RETURN action NOT IN ('see_profile', 'follow', 'invite', 'add') AND public.are_together(viewer, target);
END
$$;

-- Returns the reason why a participant may not write in a conversation, with any frame; null if they may.
-- 'slow' means that slow mode applies to the participant; slow_mode_wait() returns how long they have to wait.
CREATE FUNCTION obstacle(c conversation, p conversation_participant) RETURNS text LANGUAGE sql STABLE
    RETURN CASE
        WHEN NOT EXISTS (SELECT FROM "user" u WHERE u.id = p.user_id AND u.is_active AND NOT u.is_deleted) THEN 'inactive'
        WHEN c.is_archived THEN 'archived'
        WHEN NOT may_send(c, p.role, true) THEN 'role'
        WHEN c.type = 'direct' AND NOT may('write', p.user_id,
            CASE WHEN c.direct_low = p.user_id THEN c.direct_high ELSE c.direct_low END) THEN 'unwanted'
        WHEN NOT may_send(c, p.role, false) THEN 'slow' END;

-- For how many milliseconds slow mode has a participant wait.
CREATE FUNCTION slow_mode_wait(c conversation, p conversation_participant) RETURNS integer LANGUAGE sql STABLE
    RETURN CASE WHEN may_send(c, p.role, false) OR p.last_sent_at IS NULL THEN 0
        ELSE greatest(0, ceil(1000 * coalesce((c.settings ->> 'slow_mode_seconds')::integer, 0)
            - 1000 * extract(epoch FROM now() - p.last_sent_at)))::integer END;

-- may_now() and is_there_now() are for workers older than migration 0076, which may run beside newer ones. The next
-- release drops them (docs/decisions/0073).
--
-- Whether a user is here and may do something to another one, null for nobody, as of now: for a statement that has waited
-- for a lock since it began.
CREATE FUNCTION may_now(action text, viewer uuid, target uuid) RETURNS boolean LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    RETURN EXISTS (SELECT FROM public."user" u WHERE u.id = may_now.viewer AND u.is_active AND NOT u.is_deleted)
        AND (target IS NULL OR public.may(action, viewer, target));
END
$$;

-- Whether a message is there and not deleted, as of now.
CREATE FUNCTION is_there_now(message uuid, conversation uuid) RETURNS boolean LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    RETURN EXISTS (
        SELECT FROM public.message m
        WHERE m.id = is_there_now.message AND (m.conversation_id = is_there_now.conversation) IS TRUE
            AND NOT m.is_deleted
    );
END
$$;

-- Whether a user is not erased, as of now; nor will they be before the transaction of whoever asks is over.
CREATE FUNCTION is_unerased_now(account uuid) RETURNS boolean LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    PERFORM FROM public."user" u WHERE u.id = is_unerased_now.account AND u.erased_at IS NULL FOR KEY SHARE;
    RETURN FOUND;
END
$$;

-- Whether a user may forward a message, and it has not been edited since, as of now.
CREATE FUNCTION may_forward_now(sender uuid, message uuid, conversation uuid, edited timestamptz) RETURNS boolean
    LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    RETURN EXISTS (
        SELECT FROM public.message m
        JOIN public.conversation c ON c.id = m.conversation_id AND NOT c.is_deleted
        JOIN public.conversation_participant p ON p.conversation_id = m.conversation_id
            AND p.user_id = may_forward_now.sender AND p.status = 'active'
        WHERE m.id = may_forward_now.message AND (m.conversation_id = may_forward_now.conversation) IS TRUE
            AND NOT m.is_deleted AND NOT m.is_moderated AND m.sent_version > public.visible_after(c, p)
            AND coalesce(m.edited_at, '-infinity') = coalesce(may_forward_now.edited, '-infinity')
    );
END
$$;

-- A message on its way in: the fields of `_encoded` in server/queries/sending.py, by the same names (a test compares them).
CREATE TYPE outgoing_message AS (
    place integer, message_id uuid, conversation_id uuid, sender_id uuid, content text, content_type text,
    payload jsonb, formatted_content text, mentions uuid[], loud_mentions text[], hashtags text[], metadata jsonb,
    parent_message_id uuid, also_in_conversation boolean, quoted_message_id uuid, forwarded_from_id uuid,
    forwarded_sender_id uuid, source_conversation_id uuid, source_edited_at timestamptz, poll_counts integer[]
);

-- What becomes of it. Replies to one thread in one batch are numbered from its newest one, by `from_last`.
CREATE TYPE send_outcome AS (
    outcome text, wait_ms integer, is_slow boolean, root_id uuid, from_last bigint, version bigint,
    created_at timestamptz, expires_at timestamptz
);

-- Returns the message with an id, if it is in a conversation. The planner always finds it by the id: IS TRUE makes the
-- conversation a check that no index serves, and OFFSET 0 keeps conditions of the caller out (docs/decisions/0008).
CREATE FUNCTION message_in(conversation uuid, id uuid)
    RETURNS TABLE (sent_version bigint, is_deleted boolean, root_id uuid) LANGUAGE sql STABLE
    BEGIN ATOMIC
        SELECT m.sent_version, m.is_deleted, coalesce(m.thread_root_id, m.id) FROM message m
        WHERE m.id = message_in.id AND (m.conversation_id = conversation) IS TRUE OFFSET 0;
    END;

-- Returns what send_messages() asks about a sender, if they take part in a conversation. `obstacle` is that of
-- obstacle(), which is only called where it may return one. OFFSET 0 has the planner go from the participant's row to
-- the two others.
CREATE FUNCTION sender_part(conversation uuid, sender uuid) RETURNS TABLE (
    clock bigint, obstacle text, wait_ms integer, may_be_loud boolean, visible_after bigint, expires_after interval
) LANGUAGE sql STABLE
    BEGIN ATOMIC
        SELECT c.version,
            CASE WHEN c.type = 'direct' OR NOT u.is_active OR u.is_deleted OR NOT may_send(c, p.role, false)
                THEN obstacle(c, p) END,
            slow_mode_wait(c, p),
            c.type <> 'direct' AND can(p.role, 'moderator', false),
            visible_after(c, p),
            CASE WHEN c.settings <> '{}' THEN make_interval(secs => (c.settings ->> 'expire_after_seconds')::float8) END
        FROM conversation_participant p
        JOIN conversation c ON c.id = p.conversation_id AND NOT c.is_deleted
        JOIN "user" u ON u.id = p.user_id
        WHERE p.conversation_id = conversation AND p.user_id = sender AND p.status = 'active'
        OFFSET 0;
    END;

-- Stores messages of many users in many conversations, and returns what became of each (server/queries/sending.py has
-- the list of outcomes). Each statement sees what was committed before it began, so the order of the steps is a contract:
-- every step says what it needs, and what would break elsewhere.
--
-- `passes_held`: messages to a conversation that another transaction holds have the outcome `held`, instead of waiting.
-- `patience`: the max time to wait for any row after the conversations, as a `lock_timeout`.
CREATE FUNCTION send_messages(input json, passes_held boolean, patience text) RETURNS TABLE (
    place integer, outcome text, wait_ms integer, version bigint, created_at timestamptz, expires_at timestamptz,
    root_id uuid, reply_count integer, thread_order integer
) LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
#variable_conflict use_column
DECLARE
    items outgoing_message[];
    words tsvector[];
    asked uuid[];
    locked uuid[];
    taken uuid[];
    judged send_outcome[];
    has_replies boolean;
    has_slow boolean;
    root_ids uuid[];
    reply_counts integer[];
    thread_orders integer[];
BEGIN
    -- 1. Words. They take up to 6 ms, so under the lock everyone in the conversation would wait for them. They are made
    --    for those who may send, and only their conversations are locked: others do not queue for the lock (0065).
    SELECT array_agg(i), array_agg(
            CASE WHEN p.clock IS NOT NULL AND (p.obstacle IS NULL OR (p.obstacle = 'slow' AND p.wait_ms = 0))
                THEN search_words(i.conversation_id, i.content, i.payload, i.mentions, i.loud_mentions, i.hashtags) END
        ), array_agg(i.message_id)
    INTO items, words, taken
    FROM json_populate_recordset(NULL::outgoing_message, input) i
    LEFT JOIN LATERAL sender_part(i.conversation_id, i.sender_id) p ON true;
    asked := ARRAY(SELECT i.conversation_id FROM unnest(words, items) i (words) WHERE i.words IS NOT NULL);

    -- 2. Locks, in the order of the ids: two batches in another order would deadlock. Whoever changes a role, a setting
    --    or a block holds the same lock, so what the next step reads stays true until the commit.
    IF passes_held THEN
        locked := ARRAY(
            SELECT c.id FROM conversation c WHERE c.id = ANY(asked) ORDER BY c.id FOR NO KEY UPDATE SKIP LOCKED
        );
    ELSE
        locked := ARRAY(SELECT c.id FROM conversation c WHERE c.id = ANY(asked) ORDER BY c.id FOR NO KEY UPDATE);
    END IF;
    -- From here on somebody waits for this transaction. Rows that come after may be held by users who do not hold the
    -- conversation: followers, authors, an id that is not committed (0062).
    patience := set_config('lock_timeout', patience, true);

    -- 3. The outcome of each, and its number. After the lock: before it, a message would pass that was sent by a user
    --    who was removed meanwhile, or as a reply to a deleted one, and two messages would get one number.
    taken := ARRAY(SELECT m.id FROM message m WHERE m.id = ANY(taken));
    SELECT array_agg(ROW(j.outcome, j.wait_ms, j.is_slow, j.root_id, j.from_last, j.version, j.created_at,
            j.created_at + j.expires_after)::send_outcome ORDER BY j.place),
        bool_or(j.outcome = 'stored' AND j.root_id IS NOT NULL), bool_or(j.outcome = 'stored' AND j.is_slow)
    INTO judged, has_replies, has_slow
    FROM (
        SELECT k.*, clock_timestamp() AS created_at,
            k.clock + row_number() OVER (PARTITION BY k.conversation_id, k.outcome ORDER BY k.place) AS version,
            row_number() OVER (PARTITION BY k.root_id, k.outcome ORDER BY k.place DESC) AS from_last
        FROM (
            SELECT i.place, i.conversation_id, p.clock, p.wait_ms, p.obstacle = 'slow' AS is_slow, p.expires_after,
                parent.root_id,
                CASE
                    WHEN i.message_id = ANY(taken) THEN 'duplicate'
                    WHEN p.clock IS NULL THEN 'no_access'
                    WHEN p.obstacle <> 'slow' THEN p.obstacle
                    WHEN i.loud_mentions <> '{}' AND NOT p.may_be_loud THEN 'loud'
                    WHEN i.parent_message_id IS NOT NULL AND parent.root_id IS NULL THEN 'missing_parent'
                    WHEN i.quoted_message_id IS NOT NULL AND quoted.root_id IS NULL THEN 'missing_quoted'
                    WHEN i.forwarded_from_id IS NOT NULL AND NOT may_forward_now(i.sender_id, i.forwarded_from_id,
                        i.source_conversation_id, i.source_edited_at) THEN 'source_changed'
                    WHEN p.wait_ms > 0 THEN 'slow'
                    WHEN i.words IS NULL OR (p.obstacle = 'slow' AND EXISTS (
                        SELECT FROM unnest(items) o
                        WHERE o.conversation_id = i.conversation_id AND o.sender_id = i.sender_id AND o.place < i.place
                    )) THEN 'changed'
                    WHEN i.conversation_id <> ALL(locked) THEN 'held'
                    ELSE 'stored'
                END AS outcome
            FROM unnest(words, items) i (words)
            LEFT JOIN LATERAL sender_part(i.conversation_id, i.sender_id) p ON true
            LEFT JOIN LATERAL message_in(i.conversation_id, i.parent_message_id) parent
                ON NOT parent.is_deleted AND parent.sent_version > p.visible_after
            LEFT JOIN LATERAL message_in(i.conversation_id, i.quoted_message_id) quoted
                ON NOT quoted.is_deleted AND quoted.sent_version > p.visible_after
        ) k
    ) j;

    -- 4. The conversations' clocks, once each: an update for each message would leave as many dead rows.
    UPDATE conversation c SET version = f.version, message_count = c.message_count + f.messages,
        last_message_at = f.created_at, last_activity_at = f.created_at
    FROM (
        SELECT s.conversation_id, max(s.version) AS version, count(*) AS messages, max(s.created_at) AS created_at
        FROM unnest(items, judged) s WHERE s.outcome = 'stored' GROUP BY s.conversation_id
    ) f
    WHERE c.id = f.conversation_id AND c.id = ANY(locked);
    IF has_slow THEN
        UPDATE conversation_participant p SET last_sent_at = s.created_at FROM unnest(items, judged) s
        WHERE s.outcome = 'stored' AND s.is_slow AND p.conversation_id = s.conversation_id AND p.user_id = s.sender_id;
    END IF;

    -- 5. Threads. Before the messages: a reply has its place in the thread from the root. The author of the root and
    --    those who replied follow it.
    IF has_replies THEN
        WITH roots AS (
            UPDATE message m SET reply_count = m.reply_count + f.replies, thread_order = m.thread_order + f.replies,
                version = f.version
            FROM (
                SELECT s.root_id, max(s.version) AS version, count(*) AS replies
                FROM unnest(judged) s WHERE s.outcome = 'stored' GROUP BY s.root_id
            ) f
            WHERE m.id = f.root_id
            RETURNING m.id, m.conversation_id, m.sender_id, m.reply_count, m.thread_order
        ), followed AS (
            INSERT INTO thread_follow AS t (root_id, user_id, conversation_id, has_replied, last_read_order)
            SELECT f.root_id, f.user_id, f.conversation_id, bool_or(f.has_replied), max(f.thread_order) FROM (
                SELECT r.id AS root_id, s.sender_id AS user_id, r.conversation_id, true AS has_replied,
                    (r.thread_order - s.from_last + 1)::integer AS thread_order
                FROM unnest(items, judged) s JOIN roots r ON r.id = s.root_id WHERE s.outcome = 'stored'
                UNION ALL
                SELECT r.id, r.sender_id, r.conversation_id, false, 0 FROM roots r WHERE is_unerased_now(r.sender_id)
            ) f
            GROUP BY f.root_id, f.user_id, f.conversation_id
            ON CONFLICT (root_id, user_id) DO UPDATE SET has_replied = t.has_replied OR excluded.has_replied,
                last_read_order = greatest(t.last_read_order, excluded.last_read_order)
        )
        SELECT array_agg(r.id), array_agg(r.reply_count), array_agg(r.thread_order)
        INTO root_ids, reply_counts, thread_orders FROM roots r;
    END IF;

    -- 6. The messages, and the words by which they are found.
    INSERT INTO message (id, conversation_id, sender_id, content, content_type, payload, formatted_content, mentions,
        loud_mentions, hashtags, metadata, parent_message_id, thread_root_id, thread_order, also_in_conversation,
        quoted_message_id, forwarded_from_id, forwarded_sender_id, poll_counts, expires_at, sent_version, version,
        created_at, updated_at)
    SELECT s.message_id, s.conversation_id, s.sender_id, s.content, s.content_type, s.payload, s.formatted_content,
        s.mentions, s.loud_mentions, s.hashtags, s.metadata, s.parent_message_id, s.root_id,
        coalesce(r.thread_order - s.from_last + 1, 0), s.also_in_conversation, s.quoted_message_id,
        s.forwarded_from_id, s.forwarded_sender_id, s.poll_counts, s.expires_at, s.version, s.version, s.created_at,
        s.created_at
    FROM unnest(items, judged) s
    LEFT JOIN unnest(root_ids, thread_orders) r (id, thread_order) ON r.id = s.root_id
    WHERE s.outcome = 'stored';
    INSERT INTO message_search (message_id, conversation_id, created_at, words)
    SELECT s.message_id, s.conversation_id, s.created_at, s.words FROM unnest(words, items, judged) s (words)
    WHERE s.outcome = 'stored';

    RETURN QUERY SELECT s.place, s.outcome, s.wait_ms, s.version, s.created_at, s.expires_at, s.root_id, r.reply_count,
        coalesce(r.thread_order - s.from_last + 1, 0)::integer
    FROM unnest(items, judged) s
    LEFT JOIN unnest(root_ids, reply_counts, thread_orders) r (id, reply_count, thread_order) ON r.id = s.root_id;
END
$$;

-- Whether two users take part in the same conversation.
CREATE FUNCTION are_together(one uuid, other uuid) RETURNS boolean LANGUAGE plpgsql STABLE AS $$
DECLARE
    fewer uuid := are_together.one;
    more uuid := are_together.other;
    most integer := 64;
    these bigint;
    those bigint;
    theirs uuid[];
BEGIN
    -- Who writes to somebody shares at least that conversation: `send` asks this for every direct message.
    IF EXISTS (
        SELECT FROM public.conversation c
        JOIN public.conversation_participant p ON p.conversation_id = c.id AND p.user_id = fewer AND p.status = 'active'
        JOIN public.conversation_participant o ON o.conversation_id = c.id AND o.user_id = more AND o.status = 'active'
        WHERE c.direct_low = least(fewer, more) AND c.direct_high = greatest(fewer, more) AND NOT c.is_deleted
    ) THEN
        RETURN true;
    END IF;
    -- The conversations of whoever has fewer are looked through: asking about strangers costs little, also for somebody
    -- who takes part in thousands. To count costs a tenth of looking, and goes on until one of them has no more.
    LOOP
        these := (SELECT count(*)
            FROM (SELECT FROM public.conversation_participant p WHERE p.user_id = fewer LIMIT most) some_of);
        those := (SELECT count(*)
            FROM (SELECT FROM public.conversation_participant p WHERE p.user_id = more LIMIT most) some_of);
        EXIT WHEN these < most OR those < most;
        most := most * 8;
    END LOOP;
    IF those < these THEN
        fewer := are_together.other;
        more := are_together.one;
    END IF;
    -- Who shares many conversations shares one of the first. LIMIT and OFFSET 0 keep the order: to the planner, which does
    -- not know them, both have as many.
    IF EXISTS (
        SELECT FROM (
            SELECT p.conversation_id FROM public.conversation_participant p
            WHERE p.user_id = fewer AND p.status = 'active' LIMIT 64
        ) some_of, LATERAL (
            SELECT FROM public.conversation_participant o
            JOIN public.conversation c ON c.id = o.conversation_id AND NOT c.is_deleted
            WHERE o.conversation_id = some_of.conversation_id AND o.user_id = more AND o.status = 'active' OFFSET 0
        ) shared
    ) THEN
        RETURN true;
    ELSIF least(these, those) <= 64 THEN
        RETURN false;
    END IF;
    -- Of two who have thousands, an array of the rest costs a seventh of asking for each.
    theirs := ARRAY(
        SELECT p.conversation_id FROM public.conversation_participant p
        WHERE p.user_id = fewer AND p.status = 'active'
    );
    RETURN EXISTS (
        SELECT FROM public.conversation_participant o
        JOIN public.conversation c ON c.id = o.conversation_id AND NOT c.is_deleted
        WHERE o.user_id = more AND o.status = 'active' AND o.conversation_id = ANY(theirs)
    );
END
$$;

-- Where any of these texts is left, in whichever table: what `openchat erase --verify` looks at. What people said and
-- called things, and what other people are called, is counted apart: that it reads the same proves nothing. In hashes,
-- keys and ids, which nobody wrote, a short name stands by chance.
CREATE FUNCTION traces(needles text[]) RETURNS TABLE (place text, is_said boolean, matches bigint)
    LANGUAGE plpgsql STABLE SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    opaque CONSTANT text[] := ARRAY['account.access_token', 'account.id_token', 'account.password',
        'account.refresh_token', 'attachment.access_token', 'conversation.invite_code', 'push_endpoint.auth',
        'push_endpoint.endpoint', 'server_key.value', 'session.token', 'verification.value'];
    id CONSTANT text := '[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}';
    whole CONSTANT text[] := ARRAY(SELECT n FROM unnest(needles) n WHERE n ~* id);
    field record;
BEGIN
    FOR field IN
        SELECT c.table_name, c.column_name FROM information_schema.columns c
        JOIN information_schema.tables t USING (table_schema, table_name)
        WHERE c.table_schema = 'public' AND t.table_type = 'BASE TABLE' AND c.data_type IN ('text', 'jsonb', 'ARRAY')
            AND c.udt_name <> '_uuid' AND c.table_name || '.' || c.column_name <> ALL (opaque)
        ORDER BY 1, 2
    LOOP
        EXECUTE format('SELECT count(*) FROM (SELECT %I::text AS words FROM public.%I) f WHERE words ILIKE ANY ($1)
            AND (regexp_replace(words, $2, '''', ''gi'') ILIKE ANY ($1) OR words ILIKE ANY ($3))',
            field.column_name, field.table_name) INTO matches USING needles, id, whole;
        IF matches > 0 THEN
            place := field.table_name || '.' || field.column_name;
            is_said := field.table_name IN ('user', 'account') OR place IN ('message.content', 'message.formatted_content', 'message.metadata',
                'message.payload', 'message.link_preview', 'message.hashtags', 'scheduled_message.words', 'draft.content',
                'message_edit.content', 'message_edit.formatted_content', 'conversation.title',
                'conversation.description', 'conversation.settings', 'report.reason');
            RETURN NEXT;
        END IF;
    END LOOP;
END
$$;
REVOKE EXECUTE ON FUNCTION traces(text[]) FROM PUBLIC;

-- Puts rows, which all name the same columns, into a table; those whose keys are taken are left out. For `openchat import`.
CREATE FUNCTION load_rows(table_name text, rows json) RETURNS bigint
    LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    columns text;
    loaded bigint;
BEGIN
    SELECT string_agg(quote_ident(key), ', ') INTO columns FROM json_object_keys(rows -> 0) AS key;
    EXECUTE format('INSERT INTO public.%I (%s) SELECT %s FROM json_populate_recordset(NULL::public.%I, $1) ON CONFLICT DO NOTHING',
        table_name, columns, columns, table_name) USING rows;
    GET DIAGNOSTICS loaded = ROW_COUNT;
    RETURN loaded;
END
$$;
REVOKE EXECUTE ON FUNCTION load_rows(text, json) FROM PUBLIC;

-- --------------------------------------------------------------------------------------- row-level security

-- For whoever reads the database directly, such as analytics or a sync engine: the same rules that the queries carry.
-- The server connects as the owner of the tables, whom policies pass by. An administrator makes a role, and lets it in:
--     CREATE ROLE analyst LOGIN; SELECT grant_reader('analyst');
-- It may only read, and says for whom: SET openchat.user_id = '…'.

CREATE FUNCTION current_user_id() RETURNS uuid LANGUAGE sql STABLE
    RETURN nullif(current_setting('openchat.user_id', true), '')::uuid;

-- Functions that run as the owner look for names in pg_catalog first and in the reader's pg_temp last, where a path that
-- does not name it has it first (docs/decisions/0035).

-- What policies ask, as the owner: a policy on conversation_participant would ask itself. Each is about the reader,
-- so that none tells what stands between others.
-- Each costs less than any operator, so that PostgreSQL asks it first: comparisons are leakproof, and would otherwise be
-- made on hidden rows before the policy, which EXPLAIN (ANALYZE) tells (docs/decisions/0043).
CREATE FUNCTION may_i(action text, target uuid) RETURNS boolean LANGUAGE sql STABLE SECURITY DEFINER COST 0.0001
    SET search_path = pg_catalog, public, pg_temp
    RETURN may(action, current_user_id(), target);

CREATE FUNCTION is_participant(conversation uuid) RETURNS boolean LANGUAGE sql STABLE SECURITY DEFINER COST 0.0001
    SET search_path = pg_catalog, public, pg_temp
    RETURN EXISTS (
        SELECT FROM conversation_participant p JOIN conversation c ON c.id = p.conversation_id AND NOT c.is_deleted
        WHERE p.conversation_id = is_participant.conversation AND p.user_id = current_user_id()
            AND p.status = 'active'
    );

-- Whether the reader has the permission `needed` in a conversation, by role or by the grant that is named. Other columns
-- of the row are not looked at: an error about one would tell what is in it.
CREATE FUNCTION is_allowed(conversation uuid, needed text, permission text) RETURNS boolean
    LANGUAGE sql STABLE SECURITY DEFINER COST 0.0001 SET search_path = pg_catalog, public, pg_temp
    RETURN EXISTS (
        SELECT FROM conversation_participant p JOIN conversation c ON c.id = p.conversation_id AND NOT c.is_deleted
        WHERE p.conversation_id = is_allowed.conversation AND p.user_id = current_user_id() AND p.status = 'active'
            AND can(p.role, needed, CASE permission
                WHEN 'can_delete_messages' THEN p.can_delete_messages
                WHEN 'can_remove_members' THEN p.can_remove_members
                ELSE false END)
    );

CREATE FUNCTION is_visible(conversation uuid, sent_version bigint) RETURNS boolean
    LANGUAGE sql STABLE SECURITY DEFINER COST 0.0001 SET search_path = pg_catalog, public, pg_temp
    RETURN EXISTS (
        SELECT FROM conversation_participant p JOIN conversation c ON c.id = p.conversation_id AND NOT c.is_deleted
        WHERE p.conversation_id = is_visible.conversation AND p.user_id = current_user_id() AND p.status = 'active'
            AND is_visible.sent_version > visible_after(c, p)
    );

-- The policies of tables, one call each, so that nothing of a reader's comes between the parts of a policy.
CREATE FUNCTION is_mine(owner uuid) RETURNS boolean LANGUAGE sql STABLE SECURITY DEFINER COST 0.0001
    SET search_path = pg_catalog, public, pg_temp
    RETURN owner = current_user_id();

CREATE FUNCTION is_message_shown(conversation uuid, sent_version bigint, is_moderated boolean, sender uuid) RETURNS boolean
    LANGUAGE sql STABLE SECURITY DEFINER COST 0.0001 SET search_path = pg_catalog, public, pg_temp
    RETURN is_visible(conversation, sent_version) AND (NOT is_moderated OR sender = current_user_id()
        OR is_allowed(conversation, 'moderator', 'can_delete_messages'));

CREATE FUNCTION is_part_shown(message uuid, of_deleted boolean) RETURNS boolean
    LANGUAGE sql STABLE SECURITY DEFINER COST 0.0001 SET search_path = pg_catalog, public, pg_temp
    RETURN EXISTS (
        SELECT FROM message m WHERE m.id = is_part_shown.message AND (of_deleted OR NOT m.is_deleted)
            AND is_message_shown(m.conversation_id, m.sent_version, m.is_moderated, m.sender_id)
    );

-- Whether the reader may see what a message said before: as its sender, a moderator, or if the settings show it to all.
CREATE FUNCTION are_edits_shown(message uuid) RETURNS boolean LANGUAGE sql STABLE SECURITY DEFINER COST 0.0001
    SET search_path = pg_catalog, public, pg_temp
    RETURN is_part_shown(message, false) AND EXISTS (
        SELECT FROM message m JOIN conversation c ON c.id = m.conversation_id
        JOIN conversation_participant p ON p.conversation_id = c.id AND p.user_id = current_user_id()
        WHERE m.id = are_edits_shown.message AND shows_edits(c, p, m.sender_id)
    );

-- A poll that was deleted, or that a moderator hides, has no votes, and a vote that was withdrawn is none. A deleted message
-- has no payload, so whether it was anonymous is not known: what the policies allow, they allow by what is there.
CREATE FUNCTION is_vote_shown(message uuid, voter uuid, options integer[]) RETURNS boolean
    LANGUAGE sql STABLE SECURITY DEFINER COST 0.0001 SET search_path = pg_catalog, public, pg_temp
    RETURN options <> '{}' AND is_part_shown(message, false) AND EXISTS (
        SELECT FROM message m WHERE m.id = is_vote_shown.message AND NOT m.is_moderated AND m.payload IS NOT NULL
            AND (voter = current_user_id() OR NOT coalesce((m.payload ->> 'is_anonymous')::boolean, false))
    );

CREATE FUNCTION is_membership_shown(conversation uuid, member uuid, status text) RETURNS boolean
    LANGUAGE sql STABLE SECURITY DEFINER COST 0.0001 SET search_path = pg_catalog, public, pg_temp
    RETURN CASE WHEN status = 'active' THEN is_participant(conversation) ELSE EXISTS (
        SELECT FROM conversation_participant them
        JOIN conversation c ON c.id = them.conversation_id AND NOT c.is_deleted
        LEFT JOIN conversation_participant me ON me.conversation_id = c.id AND me.user_id = current_user_id()
        WHERE them.conversation_id = is_membership_shown.conversation AND them.user_id = is_membership_shown.member
            AND sees_participant(current_user_id(), me, them)
    ) END;

-- Whether the reader may see what was reported or noted about a message: not if it was sent before they could see any.
-- About a message that is not there, nobody knows, so it is for readers of all of the history.
CREATE FUNCTION is_past_shown(conversation uuid, message uuid) RETURNS boolean
    LANGUAGE sql STABLE SECURITY DEFINER COST 0.0001 SET search_path = pg_catalog, public, pg_temp
    RETURN message IS NULL OR is_visible(conversation, coalesce((
        SELECT m.sent_version FROM message m
        WHERE m.id = is_past_shown.message AND m.conversation_id = is_past_shown.conversation
    ), 1));

-- Nobody sees who has reported them.
CREATE FUNCTION is_report_shown(conversation uuid, message uuid) RETURNS boolean
    LANGUAGE sql STABLE SECURITY DEFINER COST 0.0001 SET search_path = pg_catalog, public, pg_temp
    RETURN is_allowed(conversation, 'moderator', 'can_delete_messages') AND is_past_shown(conversation, message)
        AND NOT EXISTS (
            SELECT FROM message m WHERE m.id = is_report_shown.message AND m.sender_id = current_user_id()
        );

CREATE FUNCTION is_entry_shown(chain uuid, message uuid) RETURNS boolean
    LANGUAGE sql STABLE SECURITY DEFINER COST 0.0001 SET search_path = pg_catalog, public, pg_temp
    RETURN is_allowed(chain, 'admin', '') AND is_past_shown(chain, message);

-- Nor that a report about them was dismissed.
CREATE FUNCTION is_action_shown(chain uuid, message uuid, action text) RETURNS boolean
    LANGUAGE sql STABLE SECURITY DEFINER COST 0.0001 SET search_path = pg_catalog, public, pg_temp
    RETURN is_entry_shown(chain, message) AND (action <> 'dismiss_report' OR is_report_shown(chain, message));

-- Whoever begins a thread follows it from the first reply on. Where they may not see that, only what is their own doing is
-- shown: that they replied, or chose to follow.
CREATE FUNCTION is_follow_shown(owner uuid, root uuid, has_replied boolean, user_version bigint) RETURNS boolean
    LANGUAGE sql STABLE SECURITY DEFINER COST 0.0001 SET search_path = pg_catalog, public, pg_temp
    RETURN owner = current_user_id() AND (has_replied OR user_version > 0 OR is_part_shown(root, true));

-- Nobody learns who blocked or muted them.
CREATE FUNCTION is_relationship_shown(from_user uuid, to_user uuid, type text) RETURNS boolean
    LANGUAGE sql STABLE SECURITY DEFINER COST 0.0001 SET search_path = pg_catalog, public, pg_temp
    RETURN from_user = current_user_id() OR (to_user = current_user_id() AND type IN ('friend', 'follow'));

ALTER TABLE "user" ENABLE ROW LEVEL SECURITY;
ALTER TABLE session ENABLE ROW LEVEL SECURITY;
ALTER TABLE account ENABLE ROW LEVEL SECURITY;
ALTER TABLE verification ENABLE ROW LEVEL SECURITY;
ALTER TABLE conversation ENABLE ROW LEVEL SECURITY;
ALTER TABLE conversation_participant ENABLE ROW LEVEL SECURITY;
ALTER TABLE message ENABLE ROW LEVEL SECURITY;
ALTER TABLE message_reaction ENABLE ROW LEVEL SECURITY;
ALTER TABLE message_edit ENABLE ROW LEVEL SECURITY;
ALTER TABLE poll_vote ENABLE ROW LEVEL SECURITY;
ALTER TABLE thread_follow ENABLE ROW LEVEL SECURITY;
ALTER TABLE message_star ENABLE ROW LEVEL SECURITY;
ALTER TABLE draft ENABLE ROW LEVEL SECURITY;
ALTER TABLE scheduled_message ENABLE ROW LEVEL SECURITY;
ALTER TABLE push_endpoint ENABLE ROW LEVEL SECURITY;
ALTER TABLE message_search ENABLE ROW LEVEL SECURITY;
ALTER TABLE server_key ENABLE ROW LEVEL SECURITY;
ALTER TABLE attachment ENABLE ROW LEVEL SECURITY;
ALTER TABLE user_relationship ENABLE ROW LEVEL SECURITY;
ALTER TABLE approach ENABLE ROW LEVEL SECURITY;
ALTER TABLE report ENABLE ROW LEVEL SECURITY;
ALTER TABLE audit_entry ENABLE ROW LEVEL SECURITY;

CREATE POLICY user_access ON "user" FOR SELECT USING (may_i('see_face', id));
CREATE POLICY session_access ON session FOR SELECT USING (is_mine(user_id));
CREATE POLICY conversation_access ON conversation FOR SELECT USING (is_participant(id));
CREATE POLICY conversation_participant_access ON conversation_participant FOR SELECT
    USING (is_membership_shown(conversation_id, user_id, status));
CREATE POLICY message_access ON message FOR SELECT
    USING (is_message_shown(conversation_id, sent_version, is_moderated, sender_id));
CREATE POLICY message_reaction_access ON message_reaction FOR SELECT USING (is_part_shown(message_id, false));
CREATE POLICY message_edit_access ON message_edit FOR SELECT USING (are_edits_shown(message_id));
CREATE POLICY poll_vote_access ON poll_vote FOR SELECT USING (is_vote_shown(message_id, user_id, options));
CREATE POLICY thread_follow_access ON thread_follow FOR SELECT
    USING (is_follow_shown(user_id, root_id, has_replied, user_version));
CREATE POLICY message_star_access ON message_star FOR SELECT USING (is_mine(user_id));
CREATE POLICY draft_access ON draft FOR SELECT USING (is_mine(user_id));
CREATE POLICY scheduled_message_access ON scheduled_message FOR SELECT USING (is_mine(sender_id));
CREATE POLICY attachment_access ON attachment FOR SELECT USING (is_part_shown(message_id, false));
CREATE POLICY user_relationship_access ON user_relationship FOR SELECT
    USING (is_relationship_shown(from_user_id, to_user_id, type));
CREATE POLICY report_access ON report FOR SELECT USING (is_report_shown(conversation_id, message_id));
CREATE POLICY audit_entry_access ON audit_entry FOR SELECT USING (is_action_shown(chain, message_id, action));

-- The columns of "user" that not everybody may read who may read the row. Policies restrict rows, this view columns.
CREATE VIEW user_profile WITH (security_barrier) AS
    SELECT id, bio, location, website, created_at FROM "user" WHERE may_i('see_profile', id);

-- PostgreSQL grants EXECUTE on new functions to PUBLIC.
REVOKE EXECUTE ON FUNCTION may(text, uuid, uuid), are_together(uuid, uuid), may_i(text, uuid), is_participant(uuid),
    is_allowed(uuid, text, text), is_visible(uuid, bigint), are_edits_shown(uuid), silenced(uuid),
    is_mine(uuid), is_message_shown(uuid, bigint, boolean, uuid),
    is_part_shown(uuid, boolean), is_vote_shown(uuid, uuid, integer[]), is_membership_shown(uuid, uuid, text),
    is_relationship_shown(uuid, uuid, text), is_past_shown(uuid, uuid), is_report_shown(uuid, uuid),
    is_entry_shown(uuid, uuid), is_action_shown(uuid, uuid, text), is_follow_shown(uuid, uuid, boolean, bigint),
    may_now(text, uuid, uuid), is_there_now(uuid, uuid), may_forward_now(uuid, uuid, uuid, timestamptz),
    is_unerased_now(uuid), obstacle(conversation, conversation_participant),
    message_in(uuid, uuid), sender_part(uuid, uuid), send_messages(json, boolean, text) FROM PUBLIC;

-- Revokes from PUBLIC the rights to create temporary tables and objects in the schema. Neither CREATE DATABASE with a
-- template nor pg_dump copies the rights on a database, so the server calls this at every start.
CREATE FUNCTION close_to_public() RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    IF EXISTS (
        SELECT FROM pg_database d CROSS JOIN aclexplode(coalesce(d.datacl, acldefault('d', d.datdba))) a
        WHERE d.datname = current_database() AND a.grantee = 0 AND a.privilege_type = 'TEMPORARY'
    ) THEN
        EXECUTE format('REVOKE TEMPORARY ON DATABASE %I FROM PUBLIC', current_database());
    END IF;
    IF EXISTS (
        SELECT FROM pg_namespace n CROSS JOIN aclexplode(coalesce(n.nspacl, acldefault('n', n.nspowner))) a
        WHERE n.nspname = 'public' AND a.grantee = 0 AND a.privilege_type = 'CREATE'
    ) THEN
        REVOKE CREATE ON SCHEMA public FROM PUBLIC;
    END IF;
EXCEPTION WHEN insufficient_privilege THEN
    RAISE WARNING 'the owner of the database must REVOKE TEMPORARY on it, and CREATE on the schema public, FROM PUBLIC';
END
$$;
REVOKE EXECUTE ON FUNCTION close_to_public() FROM PUBLIC;

-- Takes from everybody the functions of PostgreSQL by which any role fills what all share: the table of locks, the disk,
-- the log of changes that every replica reads, and the ids of transactions. Takes away the languages, too: a DO block
-- writes to the server's log what it likes. Migrations make functions in these languages, so the owner keeps them.
-- Only a superuser can. These rights are copied with a template and are in a dump.
CREATE FUNCTION close_functions_to_public() RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    found record;
BEGIN
    FOR found IN
        SELECT 'EXECUTE' AS privilege, format('FUNCTION %s', p.oid::regprocedure) AS name,
            pg_has_role(p.proowner, 'USAGE') AS is_mine
        FROM pg_proc p CROSS JOIN aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
        WHERE p.pronamespace = 'pg_catalog'::regnamespace AND a.grantee = 0 AND a.privilege_type = 'EXECUTE'
            AND (p.proname ~ '^pg_(try_)?advisory_(xact_)?lock' OR p.proname IN ('lo_creat', 'lo_create', 'lo_from_bytea',
                'lo_put', 'lowrite', 'lo_truncate', 'lo_truncate64', 'pg_logical_emit_message', 'pg_export_snapshot',
                'pg_current_xact_id', 'txid_current'))
        UNION ALL
        SELECT 'USAGE', format('LANGUAGE %I', l.lanname), pg_has_role(l.lanowner, 'USAGE')
        FROM pg_language l CROSS JOIN aclexplode(coalesce(l.lanacl, acldefault('l', l.lanowner))) a
        WHERE l.lanispl AND l.lanpltrusted AND a.grantee = 0
    LOOP
        IF NOT found.is_mine THEN
            RAISE WARNING 'advisory locks, large objects, WAL and DO stay open to everybody: a superuser must call'
                ' close_functions_to_public()';
            RETURN;
        END IF;
        IF found.privilege = 'USAGE' THEN
            EXECUTE format('GRANT USAGE ON %s TO %I', found.name,
                (SELECT c.relowner::regrole::name FROM pg_class c WHERE c.oid = '"user"'::regclass));
        END IF;
        EXECUTE format('REVOKE %s ON %s FROM PUBLIC', found.privilege, found.name);
    END LOOP;
END
$$;
REVOKE EXECUTE ON FUNCTION close_functions_to_public() FROM PUBLIC;

-- The other databases of the cluster that everybody may connect to. All of them have one table of locks, and none of these
-- is closed as this one is: from there, a reader stops the server (docs/decisions/0045-what-readers-hold.md).
CREATE FUNCTION open_databases() RETURNS SETOF text LANGUAGE sql STABLE SET search_path = pg_catalog, public, pg_temp
BEGIN ATOMIC
    SELECT d.datname::text FROM pg_database d CROSS JOIN aclexplode(coalesce(d.datacl, acldefault('d', d.datdba))) a
    WHERE d.datallowconn AND d.datname <> current_database() AND a.grantee = 0 AND a.privilege_type = 'CONNECT'
    ORDER BY d.datname;
END;
REVOKE EXECUTE ON FUNCTION open_databases() FROM PUBLIC;

-- Statistics hold samples of all rows, hidden ones too, and the estimates of EXPLAIN tell a reader what is in them
-- (docs/decisions/0051-no-statistics.md). Keeps ANALYZE from making any for tables with policies, and deletes those there are.
CREATE FUNCTION keep_no_statistics() RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    change text;
    found record;
BEGIN
    FOR change IN
        SELECT format('ALTER TABLE public.%I %s', c.relname,
            string_agg(format('ALTER COLUMN %I SET STATISTICS 0', a.attname), ', ' ORDER BY a.attnum))
        FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
        WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'r' AND a.attstattarget IS DISTINCT FROM 0
            AND EXISTS (SELECT FROM pg_policy p WHERE p.polrelid = c.oid)
        GROUP BY c.relname
        UNION ALL
        SELECT format('ALTER INDEX public.%I ALTER COLUMN %s SET STATISTICS 0', c.relname, a.attnum)
        FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
        JOIN pg_attribute a ON a.attrelid = c.oid AND i.indkey[a.attnum - 1] = 0
        WHERE c.relnamespace = 'public'::regnamespace AND a.attstattarget IS DISTINCT FROM 0
            AND EXISTS (SELECT FROM pg_policy p WHERE p.polrelid = i.indrelid)
    LOOP
        EXECUTE change;
    END LOOP;
    BEGIN
        FOR found IN
            SELECT s.tablename, s.attname, s.inherited FROM pg_stats s
            JOIN pg_class c ON c.relname = s.tablename AND c.relnamespace = 'public'::regnamespace
            LEFT JOIN pg_index i ON i.indexrelid = c.oid
            WHERE s.schemaname = 'public' AND EXISTS (SELECT FROM pg_policy p WHERE p.polrelid = coalesce(i.indrelid, c.oid))
        LOOP
            IF current_setting('server_version_num')::integer >= 180000 THEN
                EXECUTE 'SELECT pg_clear_attribute_stats($1, $2, $3, $4)'
                    USING 'public', found.tablename, found.attname, found.inherited;
            ELSE
                DELETE FROM pg_statistic s WHERE s.starelid = format('public.%I', found.tablename)::regclass;
            END IF;
        END LOOP;
    EXCEPTION WHEN insufficient_privilege THEN
        RAISE WARNING 'statistics of hidden rows stay readable by estimates: a superuser must call keep_no_statistics()';
    END;
END
$$;
REVOKE EXECUTE ON FUNCTION keep_no_statistics() FROM PUBLIC;
SELECT keep_no_statistics();

-- Bounds what a reader takes, as far as nobody has set it yet. The timeouts are defaults, which a reader can change; the
-- number of connections, the size of temporary files and what is logged are not. They hold for whoever logs in with that
-- role. Without log_min_messages, each failing statement and each plan that a reader asks for is in the server's log.
CREATE FUNCTION bound_reader(role_name text) RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    bound record;
BEGIN
    IF (SELECT r.rolconnlimit FROM pg_roles r WHERE r.rolname = role_name) < 0 THEN
        BEGIN
            EXECUTE format('ALTER ROLE %I CONNECTION LIMIT 10', role_name);
        EXCEPTION WHEN insufficient_privilege THEN
            RAISE WARNING 'an administrator must ALTER ROLE % CONNECTION LIMIT 10', quote_ident(role_name);
        END;
    END IF;
    FOR bound IN
        SELECT b.name, b.value FROM (VALUES ('statement_timeout', '5min'), ('idle_in_transaction_session_timeout', '1min'),
            ('temp_file_limit', '1GB'), ('log_min_messages', 'fatal')) b (name, value)
        WHERE NOT EXISTS (
            SELECT FROM pg_db_role_setting s JOIN pg_roles r ON r.oid = s.setrole CROSS JOIN unnest(s.setconfig) c
            WHERE r.rolname = role_name AND s.setdatabase IN (0, (SELECT d.oid FROM pg_database d
                WHERE d.datname = current_database())) AND c LIKE b.name || '=%'
        )
    LOOP
        BEGIN
            EXECUTE format('ALTER ROLE %I SET %s = %L', role_name, bound.name, bound.value);
        EXCEPTION WHEN insufficient_privilege THEN
            RAISE WARNING 'an administrator must ALTER ROLE % SET % = %', quote_ident(role_name), bound.name,
                quote_literal(bound.value);
        END;
    END LOOP;
END
$$;
REVOKE EXECUTE ON FUNCTION bound_reader(text) FROM PUBLIC;

-- Gives a role what a reader may see, and nothing else of these tables: run again, it takes away what was granted before.
CREATE FUNCTION grant_reader(role_name text) RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    open_ones text := (SELECT string_agg(quote_ident(o.name), ', ') FROM open_databases() o (name));
BEGIN
    PERFORM close_to_public();
    IF EXISTS (
        SELECT FROM pg_roles r WHERE r.rolname = role_name AND (r.rolsuper OR r.rolbypassrls
            OR pg_has_role(r.oid, (SELECT c.relowner FROM pg_class c WHERE c.oid = '"user"'::regclass), 'MEMBER')
            OR has_schema_privilege(r.oid, 'public', 'CREATE'))
    ) THEN
        RAISE EXCEPTION 'the role % is not held by policies, or may create objects in the schema public', role_name
            USING ERRCODE = 'insufficient_privilege', HINT = 'Make a role without these rights for whoever reads.';
    END IF;
    PERFORM close_functions_to_public();
    PERFORM keep_no_statistics();
    PERFORM bound_reader(role_name);
    IF open_ones IS NOT NULL THEN
        -- Not done here: other users of the cluster may need to connect there.
        RAISE WARNING 'a reader can fill the locks of all databases from those that everybody may connect to. If nothing'
            ' else needs that: REVOKE CONNECT ON DATABASE % FROM PUBLIC', open_ones;
    END IF;
    EXECUTE format('REVOKE ALL ON ALL TABLES IN SCHEMA public FROM %I', role_name);
    EXECUTE format('GRANT SELECT (id, name, display_name, image) ON "user" TO %I', role_name);
    EXECUTE format('GRANT SELECT (id, user_id, expires_at, ip_address, user_agent, created_at) ON session TO %I',
        role_name);
    -- Not message_count nor last_message_at: they tell a newcomer of messages of before.
    EXECUTE format('GRANT SELECT (id, title, description, type, image, is_public, max_participants, is_archived,
        created_by, last_activity_at, participant_count, settings, version, settings_version, created_at)
        ON conversation TO %I', role_name);
    EXECUTE format('GRANT SELECT (id, conversation_id, user_id, role, status, can_add_members, can_remove_members,
        can_edit_conversation, can_delete_messages, can_pin_messages, joined_at, left_at, invited_by, version)
        ON conversation_participant TO %I', role_name);
    EXECUTE format('GRANT SELECT ON message, message_reaction, message_edit, poll_vote, thread_follow, message_star,
        draft, scheduled_message, report, audit_entry, user_profile TO %I', role_name);
    -- Not the switches: what somebody has set about others is theirs alone.
    EXECUTE format('GRANT SELECT (id, from_user_id, to_user_id, type, status, request_message, response_message,
        created_at, accepted_at) ON user_relationship TO %I', role_name);
    EXECUTE format('GRANT SELECT (id, message_id, uploaded_by, filename, original_filename, mime_type, file_size,
        metadata, is_deleted, created_at, updated_at) ON attachment TO %I', role_name);
    EXECUTE format('GRANT EXECUTE ON FUNCTION may_i(text, uuid), is_participant(uuid), is_allowed(uuid, text, text),
        is_visible(uuid, bigint), are_edits_shown(uuid), is_message_shown(uuid, bigint, boolean, uuid),
        is_part_shown(uuid, boolean), is_vote_shown(uuid, uuid, integer[]), is_membership_shown(uuid, uuid, text),
        is_relationship_shown(uuid, uuid, text), is_mine(uuid), is_past_shown(uuid, uuid),
        is_report_shown(uuid, uuid), is_entry_shown(uuid, uuid), is_action_shown(uuid, uuid, text),
        is_follow_shown(uuid, uuid, boolean, bigint) TO %I', role_name);
END
$$;
REVOKE EXECUTE ON FUNCTION grant_reader(text) FROM PUBLIC;
