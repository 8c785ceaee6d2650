-- The schema of OpenChat's database. A new installation gets this file, and migrations/ upgrade older databases to it.
-- tests/test_schema.py proves that both ways lead to the same schema. Read protocol/ first.
--
-- Each conversation has a version, `conversation.version`. Each durable change takes the next version in its own
-- statement, and writes it to the changed row. So the changes since a version are one indexed read per table. Deletions
-- are soft, so they are among them. See docs/decisions/0002-one-clock.md.

-- ------------------------------------------------------------------------------------------------ users

-- Replaces punctuation by spaces, in texts to index and in queries. PostgreSQL's parser tries to find addresses, paths
-- and tags at each word, up to the next space, so 10,000 characters of `1a@1a@…` took seconds. The expression replaces
-- whole runs. translate() compared each character with each mark, which took as long as parsing.
CREATE FUNCTION unpunctuated(text text) RETURNS text LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN regexp_replace(text, '[!-/:-@[-`{-~]+', ' ', 'g');

CREATE TABLE "user" (
    id uuid CONSTRAINT user_pkey PRIMARY KEY DEFAULT gen_random_uuid(),
    name text NOT NULL CONSTRAINT user_name_length CHECK (char_length(name) BETWEEN 1 AND 255),
    -- In lower case, so that the unique constraint ignores case.
    email text NOT NULL CONSTRAINT user_email_key UNIQUE CONSTRAINT user_email_lower CHECK (email = lower(email)),
    email_verified boolean NOT NULL DEFAULT false,
    image text,
    display_name text CONSTRAINT user_display_name_length CHECK (char_length(display_name) BETWEEN 1 AND 255),
    bio text CONSTRAINT user_bio_length CHECK (char_length(bio) <= 500),
    location text CONSTRAINT user_location_length CHECK (char_length(location) BETWEEN 1 AND 255),
    website text,
    -- Presence as of the last transition. server/domain/presence.py has the current state.
    is_online boolean NOT NULL DEFAULT false,
    last_seen_at timestamptz,
    -- The status that the user chose to show while connected. 'offline' means that the user never chose one, and counts
    -- as 'online'.
    status text NOT NULL DEFAULT 'offline'
        CONSTRAINT user_status_known CHECK (status IN ('online', 'away', 'busy', 'invisible', 'offline')),
    custom_status text CONSTRAINT user_custom_status_length CHECK (char_length(custom_status) BETWEEN 1 AND 255),
    is_active boolean NOT NULL DEFAULT true,
    is_deleted boolean NOT NULL DEFAULT false,
    deleted_at timestamptz,
    is_private boolean NOT NULL DEFAULT false,
    allow_friend_requests boolean NOT NULL DEFAULT true,
    show_online_status boolean NOT NULL DEFAULT true,
    -- The user version. It advances when the user's conversations, sessions, invitations, relationships, preferences or
    -- profile change. The changed row stores it, so a client that missed events finds out by comparing one number.
    version bigint NOT NULL DEFAULT 0,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    -- The user version when the profile or the privacy settings last changed.
    own_version bigint NOT NULL DEFAULT 0,
    custom_status_until timestamptz,
    -- Disabled by an administrator. Logging in does not reactivate the account, as it does after a deactivation by the
    -- user.
    is_disabled boolean NOT NULL DEFAULT false,
    -- A server administrator. docs/administration.md describes their rights.
    is_admin boolean NOT NULL DEFAULT false,
    -- When the account was erased. Only the row remains, because messages refer to it.
    erased_at timestamptz,
    -- Quiet hours in `time_zone`, without push notifications.
    quiet_from time,
    quiet_until time,
    time_zone text NOT NULL DEFAULT 'UTC',
    -- Items of the feed that are newer than this are new to the user (server/queries/feed.py).
    feed_seen_at timestamptz,
    -- The close code of the last connection (protocol/errors.py), if the server closed it. Read by `why`.
    last_close integer,
    -- Whether friends may add the user to groups and channels without an invitation.
    allow_adding boolean NOT NULL DEFAULT true,
    -- Advances when another user blocks or unblocks this one, or changes a switch about them. Workers then recheck whom
    -- this user watches. No event reports it, and the user version does not advance, because both would reveal the
    -- block.
    hidden_version bigint NOT NULL DEFAULT 0,
    -- The highest user version of the user's deleted rows. A client with a lower version may still have such a row.
    forgotten_version bigint NOT NULL DEFAULT 0,
    -- How often the user version advanced for rows that concern only this user (drafts, stars, preferences, the
    -- profile). Other advances may concern memberships, sessions or relationships, so workers read those again.
    own_moves bigint NOT NULL DEFAULT 0,
    -- When the user stopped being invisible. A device that disconnected before that does not change `last_seen_at`.
    visible_since timestamptz,
    -- Advances when the name, the display name or the image changes. Others receive it with them, so nothing else moves
    -- it.
    face_version bigint NOT NULL DEFAULT 0
)
-- Each connection writes presence, and each change advances the version. Free space on the page, and no index on these
-- columns, keep such updates out of all indexes (HOT). Many users connect together, so each row has room for a second
-- version.
WITH (fillfactor = 50);
CREATE INDEX user_words_idx ON "user"
    USING gin (to_tsvector('simple', unpunctuated(name || ' ' || coalesce(display_name, ''))));
CREATE INDEX user_custom_status_until_idx ON "user" (custom_status_until) WHERE custom_status_until IS NOT NULL;
CREATE INDEX user_to_erase_idx ON "user" (deleted_at) WHERE is_deleted AND erased_at IS NULL;

CREATE TABLE session (
    id uuid CONSTRAINT session_pkey PRIMARY KEY DEFAULT gen_random_uuid(),
    user_id uuid NOT NULL CONSTRAINT session_user_fkey REFERENCES "user" (id) ON DELETE CASCADE,
    -- SHA-256 of the token, in hex. Only the client has the token itself (256 random bits).
    token text NOT NULL CONSTRAINT session_token_key UNIQUE,
    expires_at timestamptz NOT NULL,
    ip_address text,
    user_agent text,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX session_user_idx ON session (user_id);
CREATE INDEX session_expires_idx ON session (expires_at);

-- One login method of a user. `provider_id` 'credential' is a password (argon2id), with the e-mail address as
-- `account_id`.
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
    -- False after the last participant has left. Nobody can join again, because the conversation would have no owner.
    is_active boolean NOT NULL DEFAULT true,
    is_archived boolean NOT NULL DEFAULT false,
    is_deleted boolean NOT NULL DEFAULT false,
    created_by uuid NOT NULL CONSTRAINT conversation_created_by_fkey REFERENCES "user" (id),
    last_message_at timestamptz,
    last_activity_at timestamptz NOT NULL DEFAULT now(),
    -- Both counts are updated by the statements that change the counted rows.
    message_count integer NOT NULL DEFAULT 0,
    participant_count integer NOT NULL DEFAULT 0,
    -- ConversationSettings in protocol/values.py. Settings with their default values are left out.
    settings jsonb NOT NULL DEFAULT '{}',
    -- The two users of a direct conversation, the lower id first. The unique constraint allows one conversation per
    -- pair.
    direct_low uuid CONSTRAINT conversation_direct_low_fkey REFERENCES "user" (id),
    direct_high uuid CONSTRAINT conversation_direct_high_fkey REFERENCES "user" (id),
    -- `version` is the version of the last change (see above). `access_version` is that of the last change to
    -- participants or their rights, and `settings_version` that of the last change to the settings in this row.
    version bigint NOT NULL DEFAULT 0,
    access_version bigint NOT NULL DEFAULT 0,
    settings_version bigint NOT NULL DEFAULT 0,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    image text CONSTRAINT conversation_image_length CHECK (char_length(image) BETWEEN 1 AND 2000),
    -- When the invite code expires, and how often it can still be used. Null means no limit.
    invite_expires_at timestamptz,
    invite_uses_left integer CONSTRAINT conversation_invite_uses_left_range CHECK (invite_uses_left >= 0),
    -- Number and hash of the last audit entry that was deleted because of its age. The chain continues after it.
    audit_number bigint NOT NULL DEFAULT 0,
    audit_hash bytea NOT NULL DEFAULT '',
    -- Whether an ended conversation may still have drafts and invitations. No query shows them, and a job ends them
    -- (server/queries/remains.py).
    has_remains boolean NOT NULL DEFAULT false,
    CONSTRAINT conversation_direct_pair_key UNIQUE (direct_low, direct_high),
    CONSTRAINT conversation_direct_has_pair
        CHECK ((type = 'direct') = (direct_low IS NOT NULL) AND direct_low < direct_high IS NOT false),
    CONSTRAINT conversation_group_has_title CHECK (type NOT IN ('group', 'channel') OR title IS NOT NULL)
)
-- Each message advances the version. Free space on the page, and no index on the updated columns, keep such updates out
-- of all indexes (HOT).
WITH (fillfactor = 70);
-- Python's hash of an id. Clients create the ids of conversations, and could create thousands with the same hash.
-- Workers keep dictionaries of conversations (docs/decisions/0050-ids-that-collide.md).
CREATE FUNCTION id_hash(id uuid) RETURNS bigint LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN (
        substring(('x' || replace(id::text, '-', ''))::bit(128) FROM 1 FOR 6)::bit(6)::integer::bigint
        + substring(('x' || replace(id::text, '-', ''))::bit(128) FROM 7 FOR 61)::bit(61)::bigint
        + substring(('x' || replace(id::text, '-', ''))::bit(128) FROM 68 FOR 61)::bit(61)::bigint
    ) % 2305843009213693951;
CREATE UNIQUE INDEX conversation_id_hash_key ON conversation (id_hash(id));
-- With the time, so that the conversations of one day are counted without reading those of all years.
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
    -- Permissions granted in addition to those of the role (see can()).
    can_add_members boolean NOT NULL DEFAULT false,
    can_remove_members boolean NOT NULL DEFAULT false,
    can_edit_conversation boolean NOT NULL DEFAULT false,
    can_delete_messages boolean NOT NULL DEFAULT false,
    can_pin_messages boolean NOT NULL DEFAULT false,
    notifications_enabled boolean NOT NULL DEFAULT true,
    muted_until timestamptz,
    is_muted boolean NOT NULL DEFAULT false,
    -- The read position. Unread counts and read-by counts are derived from it, so a send updates no rows of other
    -- participants.
    last_read_message_id uuid,
    last_read_version bigint NOT NULL DEFAULT 0,
    last_read_at timestamptz,
    joined_at timestamptz NOT NULL DEFAULT now(),
    left_at timestamptz,
    invited_by uuid CONSTRAINT conversation_participant_invited_by_fkey REFERENCES "user" (id),
    version bigint NOT NULL DEFAULT 0,
    -- The version when the user last joined. Earlier messages may be hidden from them (see visible_after()).
    joined_version bigint NOT NULL DEFAULT 0,
    -- The user version of the last change that concerns only this user: an invitation or a preference.
    user_version bigint NOT NULL DEFAULT 0,
    pin_order integer,
    is_hidden boolean NOT NULL DEFAULT false,
    notification_level text NOT NULL DEFAULT 'all' CONSTRAINT conversation_participant_notification_level_known
        CHECK (notification_level IN ('all', 'mentions', 'none')),
    -- Set only in conversations with slow mode.
    last_sent_at timestamptz,
    -- The newest message that one of the user's clients has received.
    delivered_message_id uuid,
    delivered_version bigint NOT NULL DEFAULT 0,
    delivered_at timestamptz,
    -- The first message that the user has marked as unread. Only the user's own clients see it, and it is independent
    -- of the read position.
    unread_from_id uuid,
    unread_from_version bigint,
    -- The version when the user last left or was removed. Later invitations and bans do not change it. See
    -- gone_version().
    left_version bigint NOT NULL DEFAULT 0,
    CONSTRAINT conversation_participant_key UNIQUE (conversation_id, user_id)
);
-- The unique constraint above is "participant_conversation_idx" of the specification.
-- Changes that concern only one user, by user version.
CREATE INDEX participant_user_version_idx ON conversation_participant (user_id, user_version) WHERE user_version > 0;
-- Changes of participants. This index and the two at the end have an expression as their condition, so that the planner
-- uses each for the statements with that expression only. By the column, it would take one of them to find a user in a
-- conversation, and read all participants. It does so where the table is small, and where a restore or REINDEX has
-- created that index last (docs/decisions/0008-plans.md).
CREATE INDEX participant_changed_idx ON conversation_participant
    ((CASE WHEN version > 0 THEN conversation_id END), version)
    WHERE (CASE WHEN version > 0 THEN conversation_id END) IS NOT NULL;
-- Users who left and were invited or banned later. Other participants may learn only that they left.
CREATE INDEX participant_left_version_idx ON conversation_participant (conversation_id, left_version)
    WHERE left_version > 0 AND left_version < version;
-- Open invitations, by invited user and by inviter.
CREATE INDEX participant_invited_idx ON conversation_participant (user_id) WHERE status = 'invited';
CREATE INDEX participant_invited_by_idx ON conversation_participant (invited_by) WHERE status = 'invited';
-- Users who are invited, have declined or are banned, among many participants.
CREATE INDEX participant_outsider_idx ON conversation_participant
    ((CASE WHEN status IN ('invited', 'declined', 'banned') THEN status END), conversation_id, user_id)
    WHERE (CASE WHEN status IN ('invited', 'declined', 'banned') THEN status END) IS NOT NULL;
-- The participants of a role, oldest first: the successor of an owner who leaves, and those who are counted.
CREATE INDEX participant_role_idx ON conversation_participant
    ((CASE WHEN status = 'active' THEN role END), conversation_id, joined_at, user_id)
    WHERE (CASE WHEN status = 'active' THEN role END) IS NOT NULL;
-- The index is not partial by `status = 'active'`: a plan made for a small table might read a whole partial index.
-- By the user alone, it would read all conversations of a user who is in thousands.
CREATE INDEX participant_user_idx ON conversation_participant (user_id, conversation_id);

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
    -- Counts by emoji, updated by the statement that changes message_reaction.
    reactions jsonb NOT NULL DEFAULT '{}',
    thread_root_id uuid CONSTRAINT message_thread_root_fkey REFERENCES message (id),
    parent_message_id uuid CONSTRAINT message_parent_fkey REFERENCES message (id),
    -- The place of a reply in its thread, from 1 without gaps. On the root, the place of its newest reply.
    thread_order integer NOT NULL DEFAULT 0,
    -- On the root of a thread, the number of replies that are not deleted.
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
    -- `sent_version` is the version when the message was sent, which is its place in the conversation. `version` is
    -- that of its last change.
    sent_version bigint NOT NULL,
    version bigint NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    -- The content of content types other than text, in the forms of protocol/payloads.py.
    payload jsonb,
    -- Mentions that name no single user: 'everyone', 'here' or a role.
    loud_mentions text[] NOT NULL DEFAULT '{}',
    -- Whether a reply is also shown in the conversation, and counts there.
    also_in_conversation boolean NOT NULL DEFAULT false,
    quoted_message_id uuid CONSTRAINT message_quoted_fkey REFERENCES message (id),
    -- The original of a forwarded message. It has no constraint, because the original is in another conversation.
    forwarded_from_id uuid,
    forwarded_sender_id uuid CONSTRAINT message_forwarded_sender_fkey REFERENCES "user" (id),
    -- The number of votes for each option, and of voters, updated by the statement that changes poll_vote.
    poll_counts integer[],
    poll_voters integer NOT NULL DEFAULT 0,
    poll_closed_at timestamptz,
    -- When the content is deleted, if the conversation's settings say so. Null after that.
    expires_at timestamptz,
    link_preview jsonb,
    -- Whether a deleted message still has reactions or votes. No query shows them, and a job deletes them
    -- (server/queries/remains.py).
    has_remains boolean NOT NULL DEFAULT false
)
-- Reactions and votes change no index. Free space on the page keeps them out of all indexes (HOT).
WITH (fillfactor = 95);
-- Pages of history, by version. Two messages can have the same `created_at`, but not the same version.
CREATE UNIQUE INDEX message_conversation_created_idx ON message (conversation_id, sent_version);
CREATE INDEX message_conversation_version_idx ON message (conversation_id, version);
-- With the id, so that the messages of a sender can be read in pages.
CREATE INDEX message_sender_idx ON message (sender_id, id);
CREATE INDEX message_thread_root_idx ON message (thread_root_id, thread_order) WHERE thread_root_id IS NOT NULL;
-- Messages shown in the conversation itself, without the replies in its threads. Unread counts use it.
CREATE INDEX message_timeline_idx ON message (conversation_id, sent_version)
    WHERE thread_root_id IS NULL OR also_in_conversation;
CREATE INDEX message_pinned_idx ON message (conversation_id, pinned_at) WHERE is_pinned;
CREATE INDEX message_expires_idx ON message (expires_at) WHERE expires_at IS NOT NULL;
-- Files, polls and the like, which searches by content type read newest first.
CREATE INDEX message_special_idx ON message (conversation_id, created_at, id)
    WHERE content_type NOT IN ('text', 'system');
CREATE INDEX message_remains_idx ON message (id) WHERE has_remains;
-- Messages that mention everyone or a role. The feed reads them newest first, one conversation after another.
CREATE INDEX message_loud_idx ON message (conversation_id, created_at, id) WHERE loud_mentions <> '{}';

-- One row per message, user and emoji. A removed reaction stays as a tombstone.
CREATE TABLE message_reaction (
    message_id uuid NOT NULL CONSTRAINT message_reaction_message_fkey REFERENCES message (id) ON DELETE CASCADE,
    user_id uuid NOT NULL CONSTRAINT message_reaction_user_fkey REFERENCES "user" (id) ON DELETE CASCADE,
    emoji text NOT NULL CONSTRAINT message_reaction_emoji_length CHECK (char_length(emoji) BETWEEN 1 AND 32),
    conversation_id uuid NOT NULL
        CONSTRAINT message_reaction_conversation_fkey REFERENCES conversation (id) ON DELETE CASCADE,
    is_removed boolean NOT NULL DEFAULT false,
    version bigint NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    -- The sender of the message, who never changes. The feed searches by this column.
    author_id uuid NOT NULL CONSTRAINT message_reaction_author_fkey REFERENCES "user" (id),
    CONSTRAINT message_reaction_pkey PRIMARY KEY (message_id, user_id, emoji)
);
CREATE INDEX message_reaction_author_idx ON message_reaction (author_id, created_at) WHERE NOT is_removed;
CREATE INDEX message_reaction_version_idx ON message_reaction (conversation_id, version);
-- With the rest of the key, so that the reactions of a user can be read in pages.
CREATE INDEX message_reaction_user_idx ON message_reaction (user_id, message_id, emoji);

-- The content of a message before each edit, and before its deletion. A deleted message keeps its place in the
-- conversation and loses its content. The client creates the id of an edit, so a repeated edit is stored once.
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

-- One row per poll and voter, so that nobody votes twice. A row without options is a withdrawn vote.
CREATE TABLE poll_vote (
    message_id uuid NOT NULL CONSTRAINT poll_vote_message_fkey REFERENCES message (id) ON DELETE CASCADE,
    user_id uuid NOT NULL CONSTRAINT poll_vote_user_fkey REFERENCES "user" (id) ON DELETE CASCADE,
    conversation_id uuid NOT NULL
        CONSTRAINT poll_vote_conversation_fkey REFERENCES conversation (id) ON DELETE CASCADE,
    -- Indexes of the options in the payload, from 0, in ascending order.
    options integer[] NOT NULL,
    version bigint NOT NULL,
    voted_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT poll_vote_pkey PRIMARY KEY (message_id, user_id)
);
CREATE INDEX poll_vote_version_idx ON poll_vote (conversation_id, version);
CREATE INDEX poll_vote_user_idx ON poll_vote (user_id, message_id);

-- Who follows a thread: its author, those who replied, and those who chose to, until they unfollow it.
CREATE TABLE thread_follow (
    root_id uuid NOT NULL CONSTRAINT thread_follow_root_fkey REFERENCES message (id) ON DELETE CASCADE,
    user_id uuid NOT NULL CONSTRAINT thread_follow_user_fkey REFERENCES "user" (id) ON DELETE CASCADE,
    conversation_id uuid NOT NULL
        CONSTRAINT thread_follow_conversation_fkey REFERENCES conversation (id) ON DELETE CASCADE,
    is_following boolean NOT NULL DEFAULT true,
    has_replied boolean NOT NULL DEFAULT false,
    -- The `thread_order` of the last reply that the user has read.
    last_read_order integer NOT NULL DEFAULT 0,
    user_version bigint NOT NULL DEFAULT 0,
    CONSTRAINT thread_follow_pkey PRIMARY KEY (root_id, user_id)
);
-- With the root, whose id contains the time of the thread's start, so that the newest threads are read without older
-- ones.
CREATE INDEX thread_follow_user_idx ON thread_follow (user_id, is_following, root_id);
-- Rows that were published to the user's clients. Those that a reply created have no user version.
CREATE INDEX thread_follow_version_idx ON thread_follow (user_id, user_version) WHERE user_version > 0;

-- Messages that a user has starred. A removed star stays as a tombstone.
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

-- The draft of a user in a conversation, shared by all of their devices. Empty content means that there is none.
CREATE TABLE draft (
    user_id uuid NOT NULL CONSTRAINT draft_user_fkey REFERENCES "user" (id) ON DELETE CASCADE,
    conversation_id uuid NOT NULL
        CONSTRAINT draft_conversation_fkey REFERENCES conversation (id) ON DELETE CASCADE,
    content text NOT NULL CONSTRAINT draft_content_length CHECK (char_length(content) <= 10000),
    user_version bigint NOT NULL,
    updated_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT draft_pkey PRIMARY KEY (user_id, conversation_id)
);
-- Drafts in a conversation that was deleted, for the job that empties them.
CREATE INDEX draft_conversation_idx ON draft (conversation_id, user_id) WHERE content <> '';
CREATE INDEX draft_version_idx ON draft (user_id, user_version) WHERE user_version > 0;

-- Messages to send at a later time. The id is that of the message, so a message that is sent twice is stored once.
CREATE TABLE scheduled_message (
    id uuid CONSTRAINT scheduled_message_pkey PRIMARY KEY,
    sender_id uuid NOT NULL CONSTRAINT scheduled_message_sender_fkey REFERENCES "user" (id) ON DELETE CASCADE,
    conversation_id uuid NOT NULL
        CONSTRAINT scheduled_message_conversation_fkey REFERENCES conversation (id) ON DELETE CASCADE,
    -- The content to send (protocol/values.py, Words).
    words jsonb NOT NULL,
    send_at timestamptz NOT NULL,
    status text NOT NULL DEFAULT 'waiting' CONSTRAINT scheduled_message_status_known
        CHECK (status IN ('waiting', 'sent', 'failed', 'cancelled')),
    -- The message of the error with which sending failed.
    problem text,
    -- When a worker claimed the message. If that worker dies, another one claims it after a while.
    claimed_at timestamptz,
    user_version bigint NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    -- The time of the next attempt, after slow mode or a busy server delayed it. The message is not claimed meanwhile.
    not_before timestamptz
);
-- Due messages, in order. A page continues after the last message of the page before.
CREATE INDEX scheduled_message_turn_idx ON scheduled_message (send_at, id) WHERE status = 'waiting';
CREATE INDEX scheduled_message_version_idx ON scheduled_message (sender_id, user_version) WHERE user_version > 0;
CREATE INDEX scheduled_message_sender_idx ON scheduled_message (sender_id, send_at);
-- The waiting messages of one sender, without those that were sent, failed or were cancelled.
CREATE INDEX scheduled_message_waiting_idx ON scheduled_message (sender_id, send_at) WHERE status = 'waiting';
-- Messages that were sent, failed or were cancelled. They are deleted after a while.
CREATE INDEX scheduled_message_over_idx ON scheduled_message (send_at) WHERE status <> 'waiting';

-- Endpoints for Web Push. Each belongs to a browser, and is deleted with the session that registered it.
CREATE TABLE push_endpoint (
    id uuid CONSTRAINT push_endpoint_pkey PRIMARY KEY DEFAULT gen_random_uuid(),
    user_id uuid NOT NULL CONSTRAINT push_endpoint_user_fkey REFERENCES "user" (id) ON DELETE CASCADE,
    session_id uuid NOT NULL CONSTRAINT push_endpoint_session_fkey REFERENCES session (id) ON DELETE CASCADE,
    endpoint text NOT NULL CONSTRAINT push_endpoint_key UNIQUE
        CONSTRAINT push_endpoint_length CHECK (char_length(endpoint) BETWEEN 1 AND 2000),
    -- The browser's keys for encrypting notifications (RFC 8291), in base64url.
    p256dh text NOT NULL,
    auth text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX push_endpoint_user_idx ON push_endpoint (user_id);
CREATE INDEX push_endpoint_session_idx ON push_endpoint (session_id);

-- Whether a search vector has mentions, also of roles. The subquery hides the condition from the planner, because
-- message_search_words_idx would serve it by reading all mentions. Not PARALLEL SAFE, because the start of parallel
-- workers takes longer than the feed's read of this index.
CREATE FUNCTION has_mentions(words tsvector) RETURNS boolean LANGUAGE sql IMMUTABLE
    RETURN (SELECT words @@ '''m:'':*'::tsquery);
-- The number of the UTC day of a time, from 1970.
CREATE FUNCTION day_number(at timestamptz) RETURNS bigint LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN floor(extract(epoch FROM at AT TIME ZONE 'UTC') / 86400)::bigint;
-- The users whom a search vector mentions, each with the periods of 1, 32 and 1,024 days that contain the time of the
-- message. The feed finds the newest mentions of a user by these.
CREATE FUNCTION mention_days(words tsvector, at timestamptz) RETURNS text[] LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN ARRAY(
        SELECT substr(w, 3) || '/' || days || '/' || day_number(at) / days
        FROM unnest(tsvector_to_array(words)) w, unnest(ARRAY[1, 32, 1024]) days
        WHERE starts_with(w, 'm:') AND length(w) = 38
    );

-- The words of each message that has words, for search. A job adds them after the send (search_queue). The statement
-- that edits, hides or deletes a message changes them immediately. They have their own table, so that reactions and
-- replies, which update the message's row, do not update the index of words.
CREATE TABLE message_search (
    message_id uuid CONSTRAINT message_search_pkey PRIMARY KEY,
    conversation_id uuid NOT NULL,
    created_at timestamptz NOT NULL,
    words tsvector NOT NULL
);
-- GIN collects new entries in a pending list. The statement that fills it merges it while it holds the locks of
-- messages. So the list is large, and a job merges it (server/queries/search_index.py).
CREATE INDEX message_search_words_idx ON message_search USING gin (words) WITH (gin_pending_list_limit = 32768);
-- Without a pending list, which each badge would have to read.
CREATE INDEX message_search_mentions_idx ON message_search USING gin (mention_days(words, created_at))
    WITH (fastupdate = off) WHERE has_mentions(words);

-- For words that are common, and for filters that match few messages. The newest messages of each conversation are read
-- until a page is full (newest_matches()).
CREATE INDEX message_search_newest_idx ON message_search (conversation_id, created_at, message_id);

-- Messages that wait for a job to add their words, one row per statement that sent some. The transaction that adds the
-- words deletes the row.
CREATE TABLE search_queue (
    -- The next transaction id when the statement began. So a job does not read again what it deleted long ago, even
    -- while an old snapshot keeps it (server/jobs/search_index.py).
    before_xid xid8 NOT NULL DEFAULT pg_snapshot_xmax(pg_current_snapshot()),
    message_ids uuid[] NOT NULL
)
-- Its rows live for less than a second.
WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);
CREATE INDEX search_queue_idx ON search_queue (before_xid);
-- It has no key, and logical replication needs to identify deleted rows.
ALTER TABLE search_queue REPLICA IDENTITY FULL;

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
    -- The user versions of both users when this row last changed.
    from_version bigint NOT NULL DEFAULT 0,
    to_version bigint NOT NULL DEFAULT 0,
    CONSTRAINT user_relationship_key UNIQUE (from_user_id, to_user_id, type),
    CONSTRAINT user_relationship_not_self CHECK (from_user_id <> to_user_id)
);
-- Changes since a user version, for either user. Partial, so that the planner uses the indexes for nothing else.
CREATE INDEX user_relationship_from_version_idx ON user_relationship (from_user_id, from_version) WHERE from_version > 0;
CREATE INDEX user_relationship_to_version_idx ON user_relationship (to_user_id, to_version) WHERE to_version > 0;
-- Users who hide from a user, without all others who follow them.
CREATE INDEX user_relationship_hiding_idx ON user_relationship (to_user_id)
    WHERE NOT can_see_online_status OR (type = 'block' AND status = 'active');
CREATE INDEX user_relationship_to_idx ON user_relationship (to_user_id, type, from_user_id);
-- Open friend requests, for the feed.
CREATE INDEX user_relationship_pending_idx ON user_relationship (to_user_id, updated_at, id)
    WHERE type = 'friend' AND status = 'pending';
-- Ended relationships without changed switches. They are deleted after a while.
CREATE INDEX user_relationship_over_idx ON user_relationship (updated_at)
    WHERE status = 'inactive' AND can_see_online_status AND can_send_messages AND can_see_profile
        AND notifications_enabled;

-- How often a user has approached another user, or changed rows of theirs, since `began_at`, by kind. Rows older than a
-- day are deleted.
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

-- One row per message and reporter. A repeated report changes nothing.
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

-- The audit log. It has one chain per conversation, and one for the server, whose id is all zeros. The entries of a
-- chain are numbered without gaps. Each contains the hash of the one before (see audit_hash()).
CREATE TABLE audit_entry (
    chain uuid NOT NULL,
    number bigint NOT NULL,
    -- Null for the command line.
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
-- Entries that are deleted because of their age. The server's own chain is kept.
CREATE INDEX audit_entry_created_idx ON audit_entry (created_at) WHERE chain <> '00000000-0000-0000-0000-000000000000';

-- ------------------------------------------------------------------------------------- about this database

-- One row. A new epoch tells every client that its versions are meaningless here, because a backup was restored.
CREATE TABLE database_epoch (
    is_only boolean CONSTRAINT database_epoch_pkey PRIMARY KEY DEFAULT true
        CONSTRAINT database_epoch_one_row CHECK (is_only),
    epoch uuid NOT NULL DEFAULT gen_random_uuid()
);
INSERT INTO database_epoch DEFAULT VALUES;

-- Keys that the server creates once. 'vapid' is the P-256 private key that signs Web Push requests (RFC 8292).
CREATE TABLE server_key (
    name text CONSTRAINT server_key_pkey PRIMARY KEY,
    value text NOT NULL
);

-- ------------------------------------------------------------------------------------------ rules and wire format

-- The permissions of roles. can() returns whether a participant with a role and a grant has a permission.
-- `needed` is the lowest role that has the permission without a grant.
CREATE FUNCTION role_rank(role text) RETURNS integer LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN array_position(ARRAY['guest', 'member', 'moderator', 'admin', 'owner'], role);

CREATE FUNCTION can(role text, needed text, granted boolean) RETURNS boolean LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN granted OR role_rank(role) >= role_rank(needed);

-- A participant may see the messages sent after this version.
CREATE FUNCTION visible_after(c conversation, p conversation_participant) RETURNS bigint
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN CASE WHEN c.settings ->> 'history' = 'from_joining' THEN p.joined_version ELSE 0 END;

-- Whether a participant may send now. The conversation must not be archived, and the role must be at least the
-- `send_role` of the settings. In slow mode, moderators may send, and others only with `has_waited`, which the caller
-- determines.
CREATE FUNCTION may_send(c conversation, role text, has_waited boolean) RETURNS boolean
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN NOT c.is_archived AND (c.settings = '{}' OR (
        role_rank(role) >= role_rank(coalesce(c.settings ->> 'send_role', 'guest'))
        AND (NOT c.settings ? 'slow_mode_seconds' OR has_waited OR role_rank(role) >= role_rank('moderator'))
    ));

-- Users whom a user has blocked or muted. Unread counts, the feed and notifications leave out their messages.
CREATE FUNCTION silenced(by_whom uuid) RETURNS uuid[] LANGUAGE sql STABLE PARALLEL SAFE
    RETURN ARRAY(
        SELECT r.to_user_id FROM user_relationship r
        WHERE r.from_user_id = by_whom AND r.type IN ('block', 'mute') AND r.status = 'active'
    );

-- Whether a participant may see earlier contents of a message of `sender`.
CREATE FUNCTION shows_edits(c conversation, p conversation_participant, sender uuid) RETURNS boolean
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN p.user_id = sender OR CASE coalesce(c.settings ->> 'edits_visible_to', 'everyone')
        WHEN 'everyone' THEN true
        WHEN 'moderators' THEN can(p.role, 'moderator', p.can_delete_messages)
        ELSE false END;

-- Puts a prefix before each word. No word may contain a space. There is no subquery, so an empty list, which most
-- messages have, costs nothing.
CREATE FUNCTION prefixed(prefix text, words text[]) RETURNS text[] LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN CASE WHEN words = '{}' THEN '{}' ELSE string_to_array(prefix || array_to_string(words, ' ' || prefix), ' ') END;

-- The search vector of a message. It has the words in the language of the connection (OPENCHAT_SEARCH_LANGUAGE), the
-- conversation (c:), mentions (m:) and hashtags (h:). So one index serves all conditions of a search.
CREATE FUNCTION search_words(conversation uuid, content text, payload jsonb, mentions uuid[], loud text[], hashtags text[])
    RETURNS tsvector LANGUAGE sql STABLE PARALLEL SAFE
    RETURN to_tsvector(unpunctuated(concat_ws(' ', content, payload ->> 'name', payload ->> 'alt',
            payload -> 'options')))
        || array_to_tsvector(ARRAY['c:' || conversation] || prefixed('m:', mentions::text[]) || prefixed('m:', loud)
            || prefixed('h:', hashtags));

-- The newest messages of these conversations before a place that match a search, newest first. Reads messages in slices
-- of time until there are enough, or until it has read `most` messages or `patience_ms` is over. So it is fast if many
-- match. The last row has no message. Its `at` is the time above which all messages were read, or null if no more match.
-- It has the numbers of messages that were read, and that matched the query.
--
-- `query`: words, hashtags and mentions, or null. `visible`: the version of each conversation above which the user sees
-- messages. `roles`: the roles of the user there. `mentioned`: the user, if they must be mentioned.
-- `kinds`: content types, or null for all.
CREATE FUNCTION newest_matches(
    query tsquery, conversations uuid[], visible bigint[], roles text[], before timestamptz, before_id uuid,
    after timestamptz, sender uuid, kinds text[], thread uuid, mentioned uuid, wanted integer, most integer,
    patience_ms integer
) RETURNS TABLE (at timestamptz, message_id uuid, messages_read integer, matched integer)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, public, pg_temp SET enable_bitmapscan = off AS $$
#variable_conflict use_column
DECLARE
    part CONSTANT integer := 500;
    finest CONSTANT interval := '1 millisecond';
    until CONSTANT timestamptz := clock_timestamp() + make_interval(secs => patience_ms / 1000.0);
    is_special CONSTANT boolean := coalesce(NOT kinds && ARRAY['text', 'system'], false);
    first timestamptz;
    last timestamptz;
    top timestamptz;
    top_id uuid;
    bottom timestamptz;
    width interval;
    places integer[];
    ids uuid[];
    times timestamptz[];
    n integer;
    added integer;
    enough integer := wanted;
BEGIN
    messages_read := 0;
    matched := 0;
    -- The times of the first and the last message to read.
    SELECT greatest(min(f.created_at), after), max(l.created_at) INTO first, last
    FROM unnest(conversations) c (id)
    CROSS JOIN LATERAL (
        SELECT s.created_at FROM message_search s WHERE s.conversation_id = c.id
        ORDER BY s.created_at, s.message_id LIMIT 1
    ) f
    CROSS JOIN LATERAL (
        SELECT s.created_at FROM message_search s
        WHERE s.conversation_id = c.id AND (s.created_at, s.message_id) < (before, before_id)
        ORDER BY s.created_at DESC, s.message_id DESC LIMIT 1
    ) l;
    IF last < first OR last IS NULL THEN
        RETURN QUERY SELECT NULL::timestamptz, NULL::uuid, 0, 0;
        RETURN;
    END IF;
    -- Half a part, if messages were sent evenly.
    width := greatest(finest * 2, least(interval '1000 years', (last - first) * (part / 2.0) / greatest(1, (
        SELECT sum(c.message_count) FROM conversation c WHERE c.id = ANY(conversations)
    ))));
    top := least(before, last + finest);
    top_id := CASE WHEN top = before THEN before_id ELSE '00000000-0000-0000-0000-000000000000'::uuid END;
    LOOP
        bottom := CASE WHEN top - first <= width THEN first ELSE top - width END;
        -- A slice with more messages is read in smaller ones, unless they were all sent in the same millisecond.
        IF is_special THEN
            SELECT count(*), array_agg(i.place) FILTER (WHERE i.is_match), array_agg(i.id) FILTER (WHERE i.is_match),
                array_agg(i.created_at) FILTER (WHERE i.is_match)
            INTO n, places, ids, times
            FROM (
                SELECT c.place, m.id, m.created_at, query IS NULL OR EXISTS (
                    SELECT FROM message_search s WHERE s.message_id = m.id AND s.words @@ query
                ) AS is_match
                FROM unnest(conversations) WITH ORDINALITY c (id, place)
                CROSS JOIN LATERAL (
                    SELECT m.id, m.created_at FROM message m
                    WHERE m.conversation_id = c.id AND m.content_type NOT IN ('text', 'system')
                        AND m.created_at >= bottom AND (m.created_at, m.id) < (top, top_id)
                    ORDER BY m.created_at, m.id
                ) m
                LIMIT CASE WHEN width > finest THEN part + 1 END
            ) i;
        ELSE
            SELECT count(*), array_agg(i.place) FILTER (WHERE i.is_match), array_agg(i.id) FILTER (WHERE i.is_match),
                array_agg(i.created_at) FILTER (WHERE i.is_match)
            INTO n, places, ids, times
            FROM (
                SELECT c.place, s.message_id AS id, s.created_at, query IS NULL OR s.words @@ query AS is_match
                FROM unnest(conversations) WITH ORDINALITY c (id, place)
                CROSS JOIN LATERAL (
                    SELECT s.message_id, s.created_at, s.words FROM message_search s
                    WHERE s.conversation_id = c.id
                        AND s.created_at >= bottom AND (s.created_at, s.message_id) < (top, top_id)
                    ORDER BY s.created_at, s.message_id
                ) s
                LIMIT CASE WHEN width > finest THEN part + 1 END
            ) i;
        END IF;
        IF n > part AND width > finest THEN
            width := greatest(least(width, top - first) / 4, finest);
            CONTINUE;
        END IF;
        messages_read := messages_read + n;
        matched := matched + coalesce(cardinality(ids), 0);
        RETURN QUERY
        SELECT i.created_at, i.id, NULL::integer, NULL::integer
        FROM unnest(places, ids, times) i (place, id, created_at)
        CROSS JOIN LATERAL (
            SELECT FROM message m
            WHERE m.id = i.id AND (m.conversation_id = conversations[i.place]) IS TRUE
                AND m.sent_version > visible[i.place] AND (sender IS NULL OR m.sender_id = sender)
                AND (kinds IS NULL OR m.content_type = ANY(kinds))
                AND (thread IS NULL OR m.thread_root_id = thread OR m.id = thread)
                AND (mentioned IS NULL OR mentioned = ANY(m.mentions)
                    OR m.loud_mentions && ARRAY['everyone', roles[i.place]])
                AND NOT m.is_deleted AND NOT m.is_moderated
            OFFSET 0
        ) m
        WHERE after IS NULL OR i.created_at > after
        ORDER BY i.created_at DESC, i.id DESC LIMIT enough;
        GET DIAGNOSTICS added = ROW_COUNT;
        enough := enough - added;
        top := bottom;
        top_id := '00000000-0000-0000-0000-000000000000';
        EXIT WHEN enough <= 0 OR top <= first OR messages_read >= most OR clock_timestamp() > until;
        IF n < part / 4 THEN
            width := least(width * 4, '1000 years');
        END IF;
    END LOOP;
    RETURN QUERY SELECT CASE WHEN top > first THEN top END, NULL::uuid, messages_read, matched;
END
$$;

-- A message in the wire format (protocol/values.py has the same fields). Content that a moderator has hidden is left
-- out for everyone. Users who may see it receive it beside the message.
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

-- The rule of who may see which participants (docs/decisions/0052): `sees_participant` for one viewer, and
-- `participant_event` for events to everyone.

-- Whether `viewer`, whose own row is `me`, sees another participant and their status. Users who may add or remove
-- others see invitations, refusals and bans. Invitations and refusals are also visible to the inviter, while they take
-- part, and to the invited user.
CREATE FUNCTION sees_participant(viewer uuid, me conversation_participant, them conversation_participant)
    RETURNS boolean LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN CASE
        WHEN them.status = 'active' THEN (me.status = 'active') IS TRUE
        WHEN them.status NOT IN ('invited', 'declined', 'banned') THEN false
        WHEN them.status <> 'banned' AND them.user_id = viewer THEN true
        ELSE (me.status = 'active' AND (can(me.role, 'admin', me.can_add_members OR me.can_remove_members)
            OR (them.status <> 'banned' AND them.invited_by = viewer))) IS TRUE END;

-- The version when a user left, or 0 if they take part or never did. Before migration 0030, only `left_at` was written,
-- and a `left_version` from before the last `joined_version` stayed as it was.
CREATE FUNCTION gone_version(p conversation_participant) RETURNS bigint LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN CASE WHEN p.status = 'active' THEN 0
        WHEN p.left_version > p.joined_version THEN p.left_version
        WHEN p.status IN ('left', 'removed', 'banned') AND p.left_at IS NOT NULL THEN p.version
        ELSE 0 END;

-- The event that a user no longer takes part. It does not contain the reason.
CREATE FUNCTION participant_left_json(p conversation_participant, participant_count integer) RETURNS json
    LANGUAGE sql STABLE
    RETURN json_build_object('type', 'participant_left', 'conversation_id', p.conversation_id,
        'version', gone_version(p), 'user_id', p.user_id, 'participant_count', participant_count);

-- The event of a participant's last change, for everyone in the conversation. If the user took part neither before nor
-- after the change, the event contains only the version.
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
        'unread_from_id', p.unread_from_id,
        'user_version', p.user_version
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
        'not_before', s.not_before,
        'user_version', s.user_version
    );

CREATE FUNCTION thread_json(t thread_follow) RETURNS json LANGUAGE sql STABLE
    RETURN json_build_object(
        'conversation_id', t.conversation_id,
        'root_id', t.root_id,
        'is_following', t.is_following,
        'last_read_order', t.last_read_order,
        'user_version', t.user_version
    );

-- The role that an invitation gives now. It is the role of the invitation, or the highest that the inviter may give
-- now. Null if the inviter may no longer add users.
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
        'invited_by', p.invited_by,
        'user_version', p.user_version
    );

-- A relationship, as one of the two users sees it.
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
        'accepted_at', r.accepted_at,
        'user_version', CASE WHEN r.from_user_id = viewer THEN r.from_version ELSE r.to_version END
    );

CREATE FUNCTION me_json(u "user") RETURNS json LANGUAGE sql STABLE
    RETURN json_build_object(
        'user', json_build_object('id', u.id, 'name', u.name, 'display_name', u.display_name, 'image', u.image,
            'revision', u.face_version),
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
        'created_at', u.created_at,
        'user_version', u.own_version
    );

-- The time of day in a zone, or in UTC if PostgreSQL does not know the zone. An update of PostgreSQL may remove names.
-- An error would abort the statement, which also reads other users' rows, and write the zone to PostgreSQL's log.
CREATE FUNCTION time_of_day(zone text) RETURNS time LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    RETURN (now() AT TIME ZONE zone)::time;
EXCEPTION WHEN invalid_parameter_value THEN
    RETURN (now() AT TIME ZONE 'UTC')::time;
END
$$;
REVOKE EXECUTE ON FUNCTION time_of_day(text) FROM PUBLIC;

-- The hash of an audit entry, over its place in the chain, its content and the hash of the entry before.
CREATE FUNCTION audit_hash(e audit_entry) RETURNS bytea LANGUAGE sql STABLE
    RETURN sha256(convert_to(jsonb_build_array(
        e.chain, e.number, e.actor_id, e.action, e.user_id, e.message_id, e.details,
        extract(epoch FROM e.created_at), encode(e.previous_hash, 'hex')
    )::text, 'UTF8'));

-- The rules of privacy for all actions (protocol/privacy.py has them in words; a test compares all cells).
-- Cheap conditions come first, because most users are neither private nor blocked.
-- PL/pgSQL resolves the names in a body when it runs. Functions that run as the owner call this one. So each table and
-- function is qualified, and no temporary table can replace one. A SET clause would do the same, but takes time for
-- each direct message (docs/decisions/0035). The same holds for may_now() and are_together().
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

-- Returns why a participant may not write in a conversation, whichever the frame, or null if they may.
-- `is_here` states whether the account is active.
-- If slow mode applies to the participant, the reason is 'slow', and slow_mode_wait() returns how long they have to
-- wait.
CREATE FUNCTION obstacle_of(c conversation, p conversation_participant, is_here boolean) RETURNS text LANGUAGE sql STABLE
    RETURN CASE
        WHEN NOT is_here THEN 'inactive'
        WHEN c.is_archived THEN 'archived'
        WHEN NOT may_send(c, p.role, true) THEN 'role'
        WHEN c.type = 'direct' AND NOT may('write', p.user_id,
            CASE WHEN c.direct_low = p.user_id THEN c.direct_high ELSE c.direct_low END) THEN 'unwanted'
        WHEN NOT may_send(c, p.role, false) THEN 'slow' END;

-- Returns the same, but looks up the account. Statements that have read the account call obstacle_of(), which PostgreSQL
-- inlines because it has no subquery.
CREATE FUNCTION obstacle(c conversation, p conversation_participant) RETURNS text LANGUAGE sql STABLE
    RETURN obstacle_of(c, p, EXISTS (SELECT FROM "user" u WHERE u.id = p.user_id AND u.is_active AND NOT u.is_deleted));

-- Returns how long slow mode makes a participant wait, in milliseconds.
CREATE FUNCTION slow_mode_wait(c conversation, p conversation_participant) RETURNS integer LANGUAGE sql STABLE
    RETURN CASE WHEN may_send(c, p.role, false) OR p.last_sent_at IS NULL THEN 0
        ELSE greatest(0, ceil(1000 * coalesce((c.settings ->> 'slow_mode_seconds')::integer, 0)
            - 1000 * extract(epoch FROM now() - p.last_sent_at)))::integer END;

-- may_now() and is_there_now() are for workers older than migration 0076, which may run beside newer ones. The next
-- release drops them (docs/decisions/0073).
--
-- Whether a user is active and may do something to `target`, as of now. Null means that there is no other user. For
-- statements that have waited for a lock since they began.
CREATE FUNCTION may_now(action text, viewer uuid, target uuid) RETURNS boolean LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    RETURN EXISTS (SELECT FROM public."user" u WHERE u.id = may_now.viewer AND u.is_active AND NOT u.is_deleted)
        AND (target IS NULL OR public.may(action, viewer, target));
END
$$;

-- Whether a message exists and is not deleted, as of now.
CREATE FUNCTION is_there_now(message uuid, conversation uuid) RETURNS boolean LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    RETURN EXISTS (
        SELECT FROM public.message m
        WHERE m.id = is_there_now.message AND (m.conversation_id = is_there_now.conversation) IS TRUE
            AND NOT m.is_deleted
    );
END
$$;

-- Whether a user is not erased, as of now. The row lock prevents an erasure until the caller's transaction ends.
CREATE FUNCTION is_unerased_now(account uuid) RETURNS boolean LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    PERFORM FROM public."user" u WHERE u.id = is_unerased_now.account AND u.erased_at IS NULL FOR KEY SHARE;
    RETURN FOUND;
END
$$;

-- Whether a user may forward a message whose last edit is still `edited`, as of now.
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

-- A message to store. The fields have the names of those in `_encoded` in server/queries/sending.py (a test compares
-- them).
CREATE TYPE outgoing_message AS (
    place integer, message_id uuid, conversation_id uuid, sender_id uuid, content text, content_type text,
    payload jsonb, formatted_content text, mentions uuid[], loud_mentions text[], hashtags text[], metadata jsonb,
    parent_message_id uuid, also_in_conversation boolean, quoted_message_id uuid, forwarded_from_id uuid,
    forwarded_sender_id uuid, source_conversation_id uuid, source_edited_at timestamptz, poll_counts integer[]
);

-- The outcome for a message. `from_last` numbers the replies to one thread in a batch, from the newest one.
CREATE TYPE send_outcome AS (
    outcome text, wait_ms integer, is_slow boolean, root_id uuid, from_last bigint, version bigint,
    created_at timestamptz, expires_at timestamptz
);

-- Returns the message with an id, if it is in a conversation. The planner always finds it by the id. IS TRUE keeps it
-- from using an index on the conversation, and OFFSET 0 from adding conditions of the caller (docs/decisions/0008).
CREATE FUNCTION message_in(conversation uuid, id uuid)
    RETURNS TABLE (sent_version bigint, is_deleted boolean, root_id uuid) LANGUAGE sql STABLE
    BEGIN ATOMIC
        SELECT m.sent_version, m.is_deleted, coalesce(m.thread_root_id, m.id) FROM message m
        WHERE m.id = message_in.id AND (m.conversation_id = conversation) IS TRUE OFFSET 0;
    END;

-- Returns what send_messages() needs to know about a sender who takes part in a conversation. `obstacle` is the result
-- of obstacle_of(). `is_candidate` is the part of it that costs little: it leaves out blocks in direct conversations.
-- The planner computes only the columns that a statement uses. OFFSET 0 makes it start from the participant's row.
CREATE FUNCTION sender_part(conversation uuid, sender uuid) RETURNS TABLE (
    clock bigint, is_candidate boolean, obstacle text, wait_ms integer, may_be_loud boolean, visible_after bigint,
    expires_after interval
) LANGUAGE sql STABLE
    BEGIN ATOMIC
        SELECT c.version,
            u.is_active AND NOT u.is_deleted AND may_send(c, p.role, slow_mode_wait(c, p) = 0),
            obstacle_of(c, p, u.is_active AND NOT u.is_deleted),
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

-- Locks conversations in the order of their ids, because two statements in different orders would deadlock. Returns
-- those that are locked. With `passes_held`, it skips those that another transaction holds. Otherwise it waits for
-- them, and returns none if a wait exceeds `lock_timeout`.
CREATE FUNCTION lock_conversations(ids uuid[], passes_held boolean) RETURNS uuid[]
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    IF passes_held THEN
        RETURN ARRAY(SELECT c.id FROM conversation c WHERE c.id = ANY(ids) ORDER BY c.id FOR NO KEY UPDATE SKIP LOCKED);
    END IF;
    BEGIN
        RETURN ARRAY(SELECT c.id FROM conversation c WHERE c.id = ANY(ids) ORDER BY c.id FOR NO KEY UPDATE);
    EXCEPTION WHEN lock_not_available THEN
        RETURN '{}';
    END;
END
$$;

-- Stores messages of many users in many conversations, and returns the outcome of each message.
-- server/queries/sending.py lists the outcomes. Each statement sees everything that was committed before it began, so
-- the order of the steps matters. The comment of a step states what it needs, and what would fail elsewhere.
--
-- `passes_held`: messages to a conversation that another transaction holds get the outcome `held`. Otherwise they get
-- it if the statement waits for the conversation longer than `lock_timeout`.
-- `patience`: max time to wait for any row after the conversations, as a `lock_timeout`.
CREATE FUNCTION send_messages(input json, passes_held boolean, patience text) RETURNS TABLE (
    place integer, outcome text, wait_ms integer, version bigint, created_at timestamptz, expires_at timestamptz,
    root_id uuid, reply_count integer, thread_order integer
) LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
#variable_conflict use_column
DECLARE
    items outgoing_message[];
    candidates boolean[];
    asked uuid[];
    locked uuid[];
    taken uuid[];
    judged send_outcome[];
    has_replies boolean;
    has_slow boolean;
    has_mentions boolean;
    root_ids uuid[];
    reply_counts integer[];
    thread_orders integer[];
BEGIN
    -- 1. Users who may send. The conversations of others are not locked, so they delay nobody (0065).
    SELECT array_agg(i), array_agg(coalesce(p.is_candidate, false)), array_agg(i.message_id),
        bool_or(i.mentions <> '{}')
    INTO items, candidates, taken, has_mentions
    FROM json_populate_recordset(NULL::outgoing_message, input) i
    LEFT JOIN LATERAL sender_part(i.conversation_id, i.sender_id) p ON true;
    asked := ARRAY(SELECT i.conversation_id FROM unnest(candidates, items) i (is_candidate) WHERE i.is_candidate);

    -- 2. Locks. Changes of roles, settings and blocks take the same ones. So the results of the next step stay true
    --    until the commit.
    locked := lock_conversations(asked, passes_held);
    -- From here on, others wait for this transaction. The rows that follow may be locked by transactions that do not
    -- hold the conversation: followers, authors, an id that is not committed (0062).
    patience := set_config('lock_timeout', patience, true);

    -- 3. The outcome and the version of each message, after the lock. Before it, a message of a user who was removed
    --    meanwhile would be stored, or a reply to a deleted message. Two messages would get one version.
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
                    WHEN NOT i.is_candidate OR (p.obstacle = 'slow' AND EXISTS (
                        SELECT FROM unnest(items) o
                        WHERE o.conversation_id = i.conversation_id AND o.sender_id = i.sender_id AND o.place < i.place
                    )) THEN 'changed'
                    WHEN i.conversation_id <> ALL(locked) THEN 'held'
                    ELSE 'stored'
                END AS outcome
            FROM unnest(candidates, items) i (is_candidate)
            LEFT JOIN LATERAL sender_part(i.conversation_id, i.sender_id) p ON true
            LEFT JOIN LATERAL message_in(i.conversation_id, i.parent_message_id) parent
                ON NOT parent.is_deleted AND parent.sent_version > p.visible_after
            LEFT JOIN LATERAL message_in(i.conversation_id, i.quoted_message_id) quoted
                ON NOT quoted.is_deleted AND quoted.sent_version > p.visible_after
        ) k
    ) j;

    -- 4. The versions of conversations, once each, because an update per message would leave as many dead rows.
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

    -- 5. Threads, before the messages, because the root determines the place of a reply in its thread. The author of
    --    the root and those who replied follow the thread.
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

    -- 6. The messages, which wait for a job to add their words. Words take up to 6 ms. The feed and the badge find
    --    mentioned users by the search index, so these are added here.
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
    INSERT INTO search_queue (message_ids)
    SELECT array_agg(s.message_id) FROM unnest(items, judged) s WHERE s.outcome = 'stored' HAVING count(*) > 0;
    IF has_mentions THEN
        INSERT INTO message_search (message_id, conversation_id, created_at, words)
        SELECT s.message_id, s.conversation_id, s.created_at,
            search_words(s.conversation_id, '', NULL, s.mentions, '{}', '{}')
        FROM unnest(items, judged) s WHERE s.outcome = 'stored' AND s.mentions <> '{}';
    END IF;

    RETURN QUERY SELECT s.place, s.outcome, s.wait_ms, s.version, s.created_at, s.expires_at, s.root_id, r.reply_count,
        coalesce(r.thread_order - s.from_last + 1, 0)::integer
    FROM unnest(items, judged) s
    LEFT JOIN unnest(root_ids, reply_counts, thread_orders) r (id, reply_count, thread_order) ON r.id = s.root_id;
END
$$;

-- Returns what the functions that change messages need to know about a user who takes part in a conversation. Messages
-- sent up to `hidden_until` may be hidden from some participants. The rest is as in sender_part().
CREATE FUNCTION part_in(conversation uuid, member uuid) RETURNS TABLE (
    clock bigint, is_here boolean, obstacle text, wait_ms integer, visible_after bigint, hidden_until bigint
) LANGUAGE sql STABLE
    BEGIN ATOMIC
        SELECT c.version, u.is_active AND NOT u.is_deleted, obstacle_of(c, p, u.is_active AND NOT u.is_deleted),
            slow_mode_wait(c, p), visible_after(c, p),
            CASE WHEN c.settings ->> 'history' = 'from_joining' THEN c.access_version ELSE 0 END
        FROM conversation_participant p
        JOIN conversation c ON c.id = p.conversation_id AND NOT c.is_deleted
        JOIN "user" u ON u.id = p.user_id
        WHERE p.conversation_id = conversation AND p.user_id = member AND p.status = 'active'
        OFFSET 0;
    END;

-- A reaction to add or remove. The fields have the names of those in `_encoded` in server/queries/reactions.py.
-- `normal` is the spelling in which new reactions are stored, and `typed` is that of the frame.
CREATE TYPE reaction_request AS (
    place integer, conversation_id uuid, message_id uuid, user_id uuid, normal text, typed text, is_added boolean
);

-- The outcome for a reaction. `total` is the number of users with this emoji after the change.
CREATE TYPE reaction_outcome AS (
    outcome text, wait_ms integer, emoji text, version bigint, total integer, is_from_before boolean, author_id uuid
);

-- Adds and removes reactions of many users in many conversations, and returns the outcome of each, as send_messages()
-- does for messages. server/queries/reactions.py lists the outcomes. There is at most one request per user and message.
CREATE FUNCTION change_reactions(
    input json, passes_held boolean, patience text, most_of_message integer, most_of_user integer
) RETURNS TABLE (
    place integer, outcome text, wait_ms integer, emoji text, version bigint, total integer, is_from_before boolean
) LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
#variable_conflict use_column
DECLARE
    items reaction_request[];
    asked uuid[];
    locked uuid[];
    judged reaction_outcome[];
BEGIN
    -- 1. Locks of the conversations, except of those in which the user does not take part (0065).
    items := ARRAY(SELECT i FROM json_populate_recordset(NULL::reaction_request, input) i);
    asked := ARRAY(
        SELECT i.conversation_id FROM unnest(items) i WHERE EXISTS (
            SELECT FROM conversation_participant p
            WHERE p.conversation_id = i.conversation_id AND p.user_id = i.user_id AND p.status = 'active' OFFSET 0
        )
    );
    locked := lock_conversations(asked, passes_held);
    -- The rows that follow may be locked by transactions that do not hold the conversation (0062).
    patience := set_config('lock_timeout', patience, true);

    -- 2. The outcome and the version of each request, after the lock. `there` is the user's reaction that is not
    --    removed, which may have another spelling.
    WITH found AS (
        SELECT i.*, p.clock, p.is_here, p.obstacle, p.wait_ms, m.sender_id AS author_id, m.reactions,
            m.sent_version <= p.hidden_until AS is_from_before, coalesce(there.emoji, i.normal) AS emoji,
            there.emoji IS NOT NULL AS is_there, coalesce((
                SELECT r.version FROM message_reaction r
                WHERE r.message_id = i.message_id AND r.user_id = i.user_id AND r.emoji = i.normal
            ), m.version) AS version
        FROM unnest(items) i
        LEFT JOIN LATERAL part_in(i.conversation_id, i.user_id) p ON true
        LEFT JOIN message m ON m.id = i.message_id AND (m.conversation_id = i.conversation_id) IS TRUE
            AND NOT m.is_deleted AND m.sent_version > p.visible_after
        LEFT JOIN LATERAL (
            SELECT r.emoji FROM message_reaction r
            WHERE r.message_id = i.message_id AND r.user_id = i.user_id AND NOT r.is_removed
                AND (r.emoji = i.normal OR (NOT i.is_added
                    AND translate(r.emoji, E'\uFE0E\uFE0F', '') = translate(i.typed, E'\uFE0E\uFE0F', '')))
            ORDER BY r.emoji = i.typed DESC, r.emoji = i.normal DESC LIMIT 1
        ) there ON true
    ), checked AS (
        SELECT f.*, CASE
            WHEN f.author_id IS NULL THEN 'missing'
            WHEN NOT f.is_here THEN 'inactive'
            -- A repeated reaction and a removal reach nobody, so they need no permission to send.
            WHEN f.is_added AND NOT f.is_there AND f.obstacle <> 'slow' THEN f.obstacle
            WHEN f.is_added AND NOT f.is_there AND f.wait_ms > 0 THEN 'slow'
            WHEN f.conversation_id <> ALL(asked) THEN 'changed'
            WHEN f.conversation_id <> ALL(locked) THEN 'held'
            WHEN f.is_added = f.is_there THEN 'unchanged'
            WHEN f.is_added AND most_of_user <= (
                SELECT count(*) FROM message_reaction o
                WHERE o.message_id = f.message_id AND o.user_id = f.user_id AND o.emoji <> f.emoji
            ) THEN 'too_many_of_user'
            WHEN f.is_added AND NOT f.reactions ? f.emoji THEN 'new'
            ELSE 'stored' END AS outcome
        FROM found f
    ), ranked AS (
        SELECT c.*, min(c.place) OVER (PARTITION BY c.message_id, c.emoji, c.outcome) AS first_place FROM checked c
    ), fitted AS (
        SELECT r.*, CASE
            WHEN r.outcome <> 'new' THEN r.outcome
            WHEN (SELECT count(*) FROM jsonb_object_keys(r.reactions))
                + dense_rank() OVER (PARTITION BY r.message_id, r.outcome ORDER BY r.first_place) > most_of_message
                THEN 'too_many_of_message'
            ELSE 'stored' END AS fitting
        FROM ranked r
    ), numbered AS (
        SELECT f.*, CASE WHEN f.fitting = 'stored'
                THEN f.clock + row_number() OVER (PARTITION BY f.conversation_id, f.fitting ORDER BY f.place)
                ELSE f.version END AS own_version,
            greatest(0, coalesce((f.reactions ->> f.emoji)::integer, 0) + sum(CASE WHEN f.is_added THEN 1 ELSE -1 END)
                OVER (PARTITION BY f.message_id, f.emoji, f.fitting ORDER BY f.place)) AS total
        FROM fitted f
    )
    SELECT array_agg(ROW(n.fitting, n.wait_ms, n.emoji, n.own_version, n.total, n.is_from_before, n.author_id)
        ::reaction_outcome ORDER BY n.place)
    INTO judged FROM numbered n;

    -- 3. The versions of conversations and the counts in messages, once each, because an update per reaction would
    --    leave as many dead rows.
    UPDATE conversation c SET version = f.version
    FROM (
        SELECT s.conversation_id, max(s.version) AS version
        FROM unnest(items, judged) s WHERE s.outcome = 'stored' GROUP BY s.conversation_id
    ) f
    WHERE c.id = f.conversation_id AND c.id = ANY(locked);
    UPDATE message m SET reactions = (m.reactions || f.counts) - f.gone
    FROM (
        SELECT l.conversation_id, l.message_id, jsonb_object_agg(l.emoji, l.total) AS counts,
            coalesce(array_agg(l.emoji) FILTER (WHERE l.total = 0), '{}') AS gone
        FROM (
            SELECT DISTINCT ON (s.message_id, s.emoji) s.conversation_id, s.message_id, s.emoji, s.total
            FROM unnest(items, judged) s WHERE s.outcome = 'stored' ORDER BY s.message_id, s.emoji, s.place DESC
        ) l
        GROUP BY l.conversation_id, l.message_id
    ) f
    WHERE m.id = f.message_id AND (m.conversation_id = f.conversation_id) IS TRUE;

    -- 4. The reactions. A removed one keeps its row, so that clients that were away learn of it.
    INSERT INTO message_reaction (message_id, user_id, emoji, conversation_id, version, author_id, created_at)
    SELECT s.message_id, s.user_id, s.emoji, s.conversation_id, s.version, s.author_id, clock_timestamp()
    FROM unnest(items, judged) s WHERE s.outcome = 'stored' AND s.is_added
    ON CONFLICT (message_id, user_id, emoji) DO UPDATE SET is_removed = false, version = excluded.version,
        created_at = excluded.created_at;
    UPDATE message_reaction r SET is_removed = true, version = s.version
    FROM unnest(items, judged) s
    WHERE s.outcome = 'stored' AND NOT s.is_added
        AND r.message_id = s.message_id AND r.user_id = s.user_id AND r.emoji = s.emoji;

    RETURN QUERY SELECT s.place, s.outcome, s.wait_ms, s.emoji, s.version, s.total, s.is_from_before
    FROM unnest(items, judged) s;
END
$$;

-- A vote to store. The fields have the names of those of `VoteRequest` in server/queries/polls.py. `options` are in
-- ascending order.
CREATE TYPE vote_request AS (
    place integer, conversation_id uuid, message_id uuid, user_id uuid, options integer[]
);

-- The outcome for a vote. `poll_counts` and `poll_voters` are those after the vote, and `option_count` is the number of
-- options of the poll.
CREATE TYPE vote_outcome AS (
    outcome text, wait_ms integer, option_count integer, version bigint, poll_counts integer[], poll_voters integer,
    is_anonymous boolean, is_from_before boolean
);

-- Returns whether a time as text, as the server writes it in `closes_at`, has passed. PostgreSQL accepts no offsets from
-- UTC of 16 hours or more, so they are subtracted.
CREATE FUNCTION has_passed(moment text) RETURNS boolean LANGUAGE sql VOLATILE
    RETURN (regexp_replace(moment, '(Z|[+-]\d\d:\d\d)$', '')::timestamp
        - coalesce(substring(moment, '[+-]\d\d:\d\d$'), '0')::interval) AT TIME ZONE 'UTC' <= clock_timestamp();

-- Stores, changes and withdraws votes of many users in many polls, and returns the outcome of each, as
-- change_reactions() does for reactions. server/queries/polls.py lists the outcomes. There is at most one request per
-- user and poll.
CREATE FUNCTION change_votes(input json, passes_held boolean, patience text) RETURNS TABLE (
    place integer, outcome text, wait_ms integer, option_count integer, version bigint, poll_counts integer[],
    poll_voters integer, is_anonymous boolean, is_from_before boolean
) LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
#variable_conflict use_column
DECLARE
    items vote_request[];
    asked uuid[];
    locked uuid[];
    judged vote_outcome[];
BEGIN
    -- 1. Locks of the conversations, except of those in which the user does not take part (0065).
    items := ARRAY(SELECT i FROM json_populate_recordset(NULL::vote_request, input) i);
    asked := ARRAY(
        SELECT i.conversation_id FROM unnest(items) i WHERE EXISTS (
            SELECT FROM conversation_participant p
            WHERE p.conversation_id = i.conversation_id AND p.user_id = i.user_id AND p.status = 'active' OFFSET 0
        )
    );
    locked := lock_conversations(asked, passes_held);
    -- The rows that follow may be locked by transactions that do not hold the conversation (0062).
    patience := set_config('lock_timeout', patience, true);

    -- 2. The outcome and the version of each request, after the lock.
    WITH found AS (
        SELECT i.*, p.clock, p.is_here, p.obstacle, p.wait_ms, m.content_type, m.payload, m.is_moderated, m.poll_counts,
            m.poll_voters, m.poll_closed_at, m.sent_version <= p.hidden_until AS is_from_before,
            coalesce(v.options, '{}') AS before, coalesce(v.version, m.version) AS version,
            jsonb_array_length(m.payload -> 'options') AS option_count
        FROM unnest(items) i
        LEFT JOIN LATERAL part_in(i.conversation_id, i.user_id) p ON true
        LEFT JOIN message m ON m.id = i.message_id AND (m.conversation_id = i.conversation_id) IS TRUE
            AND NOT m.is_deleted AND m.sent_version > p.visible_after
        LEFT JOIN poll_vote v ON v.message_id = i.message_id AND v.user_id = i.user_id
            AND (v.conversation_id = i.conversation_id) IS TRUE
    ), checked AS (
        SELECT f.*, CASE
            WHEN f.content_type IS NULL THEN 'missing'
            WHEN f.content_type <> 'poll' THEN 'no_poll'
            WHEN f.is_moderated OR f.payload IS NULL THEN 'missing'
            WHEN NOT f.is_here THEN 'inactive'
            -- A repeated vote and a withdrawal reach nobody, so they need no permission to send.
            WHEN f.options NOT IN ('{}', f.before) AND f.obstacle <> 'slow' THEN f.obstacle
            WHEN f.options NOT IN ('{}', f.before) AND f.wait_ms > 0 THEN 'slow'
            WHEN f.conversation_id <> ALL(asked) THEN 'changed'
            WHEN f.conversation_id <> ALL(locked) THEN 'held'
            WHEN f.options = f.before THEN 'unchanged'
            WHEN f.poll_closed_at IS NOT NULL OR has_passed(f.payload ->> 'closes_at') THEN 'closed'
            WHEN f.options[cardinality(f.options)] >= f.option_count THEN 'unknown_option'
            WHEN cardinality(f.options) > 1 AND NOT coalesce((f.payload ->> 'is_multiple')::boolean, false)
                THEN 'too_many_options'
            ELSE 'stored' END AS outcome
        FROM found f
    ), counted AS (
        SELECT o.place, array_agg(o.total ORDER BY o.number) AS poll_counts
        FROM (
            SELECT c.place, number, c.poll_counts[number]
                + sum((number - 1 = ANY(c.options))::integer - (number - 1 = ANY(c.before))::integer)
                    OVER (PARTITION BY c.message_id, number ORDER BY c.place) AS total
            FROM checked c CROSS JOIN generate_subscripts(c.poll_counts, 1) number WHERE c.outcome = 'stored'
        ) o
        GROUP BY o.place
    ), numbered AS (
        SELECT c.*, CASE WHEN c.outcome = 'stored'
                THEN c.clock + row_number() OVER (PARTITION BY c.conversation_id, c.outcome ORDER BY c.place)
                ELSE c.version END AS own_version,
            c.poll_voters + sum((c.options <> '{}')::integer - (c.before <> '{}')::integer)
                OVER (PARTITION BY c.message_id, c.outcome ORDER BY c.place) AS voters
        FROM checked c
    )
    SELECT array_agg(ROW(n.outcome, n.wait_ms, n.option_count, n.own_version, coalesce(o.poll_counts, '{}'), n.voters,
        coalesce((n.payload ->> 'is_anonymous')::boolean, false), n.is_from_before)::vote_outcome ORDER BY n.place)
    INTO judged FROM numbered n LEFT JOIN counted o USING (place);

    -- 3. The versions of conversations and the counts in messages, once each, because an update per vote would leave as
    --    many dead rows.
    UPDATE conversation c SET version = f.version
    FROM (
        SELECT s.conversation_id, max(s.version) AS version
        FROM unnest(items, judged) s WHERE s.outcome = 'stored' GROUP BY s.conversation_id
    ) f
    WHERE c.id = f.conversation_id AND c.id = ANY(locked);
    UPDATE message m SET poll_counts = f.poll_counts, poll_voters = f.poll_voters
    FROM (
        SELECT DISTINCT ON (s.message_id) s.conversation_id, s.message_id, s.poll_counts, s.poll_voters
        FROM unnest(items, judged) s WHERE s.outcome = 'stored' ORDER BY s.message_id, s.place DESC
    ) f
    WHERE m.id = f.message_id AND (m.conversation_id = f.conversation_id) IS TRUE;

    -- 4. The votes. A withdrawn one keeps its row, so that clients that were away learn of it.
    INSERT INTO poll_vote (message_id, user_id, conversation_id, options, version, voted_at)
    SELECT s.message_id, s.user_id, s.conversation_id, s.options, s.version, clock_timestamp()
    FROM unnest(items, judged) s WHERE s.outcome = 'stored'
    ON CONFLICT (message_id, user_id) DO UPDATE SET options = excluded.options, version = excluded.version,
        voted_at = excluded.voted_at;

    RETURN QUERY SELECT s.place, s.outcome, s.wait_ms, s.option_count, s.version, s.poll_counts, s.poll_voters,
        s.is_anonymous, s.is_from_before
    FROM unnest(items, judged) s;
END
$$;

-- A user who joins a conversation. The fields have the names of those of `JoinRequest` in server/queries/joins.py.
CREATE TYPE join_request AS (place integer, conversation_id uuid, user_id uuid, invite_code text);

-- The outcome of a join. `version` is that of the participation, and `participant_count` the count after it. The version
-- after `version` is that of a system message, if there `is_posted` one.
CREATE TYPE join_outcome AS (
    outcome text, max_participants integer, version bigint, participant_count integer, is_posted boolean
);

-- Returns whether a user may join a conversation, with the outcome `stored` if so, and what the join needs to know of
-- it. Without a row, the conversation is not open to the user.
CREATE FUNCTION entrance(conversation uuid, member uuid, code text) RETURNS TABLE (
    outcome text, clock bigint, participant_count integer, max_participants integer, uses_left integer,
    are_posted boolean
) LANGUAGE sql STABLE
    BEGIN ATOMIC
        SELECT CASE
                WHEN p.status = 'banned' THEN 'banned'
                -- An invitation counts only while its sender may still add users.
                WHEN p.status = 'invited' AND NOT c.is_public AND code IS NULL AND invited_as(p) IS NULL
                    THEN 'uninvited'
                WHEN p.status IS DISTINCT FROM 'active' AND c.participant_count >= c.max_participants THEN 'full'
                WHEN NOT u.is_active OR u.is_deleted THEN 'inactive'
                WHEN p.status = 'active' THEN 'unchanged'
                ELSE 'stored' END,
            c.version, c.participant_count, c.max_participants, c.invite_uses_left,
            coalesce((c.settings ->> 'system_messages')::boolean, true)
        FROM conversation c
        JOIN "user" u ON u.id = member
        LEFT JOIN conversation_participant p ON p.conversation_id = c.id AND p.user_id = member
        WHERE c.id = conversation AND c.type IN ('group', 'channel') AND c.is_active AND NOT c.is_deleted
            AND CASE WHEN code IS NULL THEN c.is_public OR p.status IN ('active', 'invited')
                -- A join that is repeated after the last use has the result of the first one.
                ELSE c.invite_code = code AND (p.status = 'active' OR (
                    (c.invite_expires_at > now() OR c.invite_expires_at IS NULL)
                    AND (c.invite_uses_left > 0 OR c.invite_uses_left IS NULL))) END
        OFFSET 0;
    END;

-- Makes many users participants of many conversations, and returns the outcome of each, as change_reactions() does for
-- reactions. server/queries/joins.py lists the outcomes. There is at most one request per user. Conversations with more
-- than `most_posted` participants get no system message.
CREATE FUNCTION join_conversations(
    input json, passes_held boolean, patience text, most_posted integer, most_memberships integer
) RETURNS TABLE (
    place integer, outcome text, max_participants integer, message json, participant json, participant_count integer,
    event json
) LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
#variable_conflict use_column
DECLARE
    items join_request[];
    asked join_request[];
    locked uuid[];
    members uuid[];
    judged join_outcome[];
BEGIN
    -- 1. Locks of the conversations that the users may join, and of these users. Others are refused without a lock
    --    (0065). A user whom another transaction holds is skipped, because others would wait for that user.
    items := ARRAY(SELECT i FROM json_populate_recordset(NULL::join_request, input) i);
    asked := ARRAY(
        SELECT i FROM unnest(items) i CROSS JOIN LATERAL entrance(i.conversation_id, i.user_id, i.invite_code) e
        WHERE e.outcome = 'stored'
    );
    locked := lock_conversations(ARRAY(SELECT a.conversation_id FROM unnest(asked) a), passes_held);
    patience := set_config('lock_timeout', patience, true);
    members := ARRAY(SELECT a.user_id FROM unnest(asked) a WHERE a.conversation_id = ANY(locked));
    members := ARRAY(SELECT u.id FROM "user" u WHERE u.id = ANY(members) ORDER BY u.id FOR NO KEY UPDATE SKIP LOCKED);

    -- 2. The outcome and the version of each request, after the locks. Memberships are counted exactly only if the
    --    cheaper count, which includes deleted conversations, exceeds the limit.
    WITH checked AS (
        SELECT i.*, e.clock, e.participant_count, e.max_participants, e.uses_left, e.are_posted, CASE
            WHEN e.outcome IS NULL THEN 'missing'
            WHEN e.outcome <> 'stored' THEN e.outcome
            WHEN i.place <> ALL(ARRAY(SELECT a.place FROM unnest(asked) a)) THEN 'changed'
            WHEN i.conversation_id <> ALL(locked) THEN 'held'
            WHEN i.user_id <> ALL(members) THEN 'user_held'
            WHEN CASE WHEN (
                SELECT count(*) FROM conversation_participant p WHERE p.user_id = i.user_id AND p.status = 'active'
            ) >= most_memberships THEN (
                SELECT count(*) FROM conversation_participant p
                JOIN conversation c ON c.id = p.conversation_id AND NOT c.is_deleted
                WHERE p.user_id = i.user_id AND p.status = 'active'
            ) >= most_memberships ELSE false END THEN 'too_many'
            ELSE 'stored' END AS outcome
        FROM unnest(items) i LEFT JOIN LATERAL entrance(i.conversation_id, i.user_id, i.invite_code) e ON true
    ), used AS (
        SELECT c.*, row_number() OVER (
                PARTITION BY c.conversation_id, c.outcome, c.invite_code IS NULL ORDER BY c.place
            ) AS use_number
        FROM checked c
    ), admitted AS (
        SELECT u.*, CASE WHEN u.outcome = 'stored' AND u.invite_code IS NOT NULL AND u.use_number > u.uses_left
                THEN 'missing' ELSE u.outcome END AS admission
        FROM used u
    ), numbered AS (
        SELECT a.*, row_number() OVER (PARTITION BY a.conversation_id, a.admission ORDER BY a.place) AS number
        FROM admitted a
    ), counted AS (
        SELECT n.*, n.participant_count + n.number AS total,
            CASE WHEN n.are_posted THEN greatest(0, most_posted - n.participant_count) ELSE 0 END AS posted,
            CASE WHEN n.admission = 'stored' AND n.participant_count + n.number > n.max_participants THEN 'full'
                ELSE n.admission END AS final
        FROM numbered n
    )
    -- Each of the first joins is followed by its system message.
    SELECT array_agg(ROW(c.final, c.max_participants, c.clock + c.number + least(c.number - 1, c.posted), c.total,
        c.number <= c.posted)::join_outcome ORDER BY c.place)
    INTO judged FROM counted c;

    -- 3. The conversations, once each, because an update per join would leave as many dead rows. Then the users, whose
    --    user version tells their devices of the conversation.
    UPDATE conversation c SET version = f.version, access_version = f.joined, participant_count = f.participant_count,
        last_activity_at = now(), message_count = c.message_count + f.posted,
        last_message_at = CASE WHEN f.posted > 0 THEN now() ELSE c.last_message_at END,
        invite_uses_left = c.invite_uses_left - f.uses
    FROM (
        SELECT s.conversation_id, max(s.version + s.is_posted::integer) AS version, max(s.version) AS joined,
            max(s.participant_count) AS participant_count, count(*) FILTER (WHERE s.is_posted) AS posted,
            count(s.invite_code) AS uses
        FROM unnest(items, judged) s WHERE s.outcome = 'stored' GROUP BY s.conversation_id
    ) f
    WHERE c.id = f.conversation_id AND c.id = ANY(locked);
    UPDATE "user" u SET version = u.version + 1
    FROM unnest(items, judged) s WHERE s.outcome = 'stored' AND u.id = s.user_id AND u.id = ANY(members);

    -- 4. The participants, as participants.ADD does for users who join themselves, and the system messages.
    INSERT INTO conversation_participant AS p (conversation_id, user_id, role, version, joined_version,
        last_read_version)
    SELECT s.conversation_id, s.user_id, 'member', s.version, s.version, s.version - 1
    FROM unnest(items, judged) s WHERE s.outcome = 'stored'
    ON CONFLICT (conversation_id, user_id) DO UPDATE SET
        role = CASE WHEN p.role = 'guest' THEN p.role ELSE coalesce(invited_as(p), excluded.role) END,
        invited_by = CASE WHEN p.status = 'invited' THEN p.invited_by END,
        status = 'active', joined_at = now(), left_at = NULL, left_version = 0,
        version = excluded.version, joined_version = excluded.joined_version,
        user_version = (SELECT u.version FROM "user" u WHERE u.id = excluded.user_id),
        last_read_version = greatest(p.last_read_version, excluded.last_read_version),
        unread_from_id = NULL, unread_from_version = NULL,
        can_add_members = false, can_remove_members = false, can_edit_conversation = false,
        can_delete_messages = false, can_pin_messages = false;

    -- The planner could look for the messages by an index that has the conversation only, and read all of its messages.
    RETURN QUERY WITH posted AS (
        INSERT INTO message AS m (conversation_id, sender_id, content, content_type, metadata, is_system_message,
            system_message_type, sent_version, version)
        SELECT s.conversation_id, s.user_id, 'joined', 'system', '{}', true, 'join', s.version + 1, s.version + 1
        FROM unnest(items, judged) s WHERE s.outcome = 'stored' AND s.is_posted
        RETURNING m.sender_id, m.conversation_id, message_json(m) AS message
    )
    SELECT s.place, s.outcome, s.max_participants, m.message,
        CASE WHEN p.user_id IS NOT NULL THEN participant_json(p) END, s.participant_count,
        CASE WHEN p.user_id IS NOT NULL THEN participant_event(p, s.participant_count) END
    FROM unnest(items, judged) s
    LEFT JOIN conversation_participant p
        ON s.outcome = 'stored' AND p.conversation_id = s.conversation_id AND p.user_id = s.user_id
    LEFT JOIN posted m
        ON s.outcome = 'stored' AND m.conversation_id = s.conversation_id AND m.sender_id = s.user_id;
END
$$;

-- Deletes the content of expired messages in these conversations, and all copies of it except forwards, which are
-- messages of their own. The row of a scheduled message stays, because it identifies repeated frames. Returns the
-- remains of those messages that were not deleted before, in the order of their versions, as edits.DELETE does for one
-- message. For a conversation that is held, it returns only its id.
--
-- `passes_held`: messages of conversations that another transaction holds stay as they are, instead of waiting.
-- `patience`: max time to wait for any row, as a `lock_timeout`.
CREATE FUNCTION expire_messages(conversations uuid[], ids uuid[], passes_held boolean, patience text) RETURNS TABLE (
    held_id uuid, message json, root_reply_count integer, is_from_before boolean
) LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
#variable_conflict use_column
DECLARE
    locked uuid[];
    gone uuid[];
    homes uuid[];
    roots uuid[];
    versions bigint[];
BEGIN
    -- 1. Locks, in the order of the ids, as in send_messages(). The conversations may be deleted.
    patience := set_config('lock_timeout', patience, true);
    IF passes_held THEN
        locked := ARRAY(
            SELECT c.id FROM conversation c WHERE c.id = ANY(conversations) ORDER BY c.id FOR NO KEY UPDATE SKIP LOCKED
        );
    ELSE
        locked := ARRAY(
            SELECT c.id FROM conversation c WHERE c.id = ANY(conversations) ORDER BY c.id FOR NO KEY UPDATE
        );
    END IF;

    -- 2. The messages that no other worker has deleted, after the lock, and the version of each deletion. Messages that
    --    users have deleted get none. The newest one comes first, so a reply is deleted before the root of its thread,
    --    and the deletion of the root is the root's last change.
    SELECT array_agg(d.id), array_agg(d.conversation_id), array_agg(d.thread_root_id), array_agg(d.version)
    INTO gone, homes, roots, versions
    FROM (
        SELECT m.id, m.conversation_id, m.thread_root_id, CASE WHEN NOT m.is_deleted THEN
            c.version + row_number() OVER (PARTITION BY m.conversation_id, m.is_deleted ORDER BY m.sent_version DESC)
            END AS version
        FROM message m CROSS JOIN LATERAL (
            SELECT o.version FROM conversation o WHERE o.id = m.conversation_id OFFSET 0
        ) c
        WHERE m.id = ANY(ids) AND (m.conversation_id = ANY(locked)) IS TRUE AND (m.expires_at <= now()) IS TRUE
    ) d;

    -- 3. The conversations' versions and counts, and the threads.
    UPDATE conversation c SET version = f.version, message_count = c.message_count - f.messages
    FROM (
        SELECT o.home, max(o.version) AS version, count(*) AS messages
        FROM unnest(homes, versions) o (home, version) WHERE o.version IS NOT NULL GROUP BY o.home OFFSET 0
    ) f
    WHERE c.id = f.home AND c.id = ANY(locked);
    UPDATE message m SET reply_count = m.reply_count - f.replies, version = f.version
    FROM (
        SELECT o.home, o.root, max(o.version) AS version, count(*) AS replies
        FROM unnest(homes, roots, versions) o (home, root, version)
        WHERE o.root IS NOT NULL AND o.version IS NOT NULL GROUP BY o.home, o.root OFFSET 0
    ) f
    WHERE m.id = f.root AND m.id = ANY(roots) AND (m.conversation_id = f.home) IS TRUE;

    -- 4. The copies. A message that a user deleted loses its expiry, too.
    DELETE FROM message_edit e WHERE e.message_id = ANY(gone) AND (e.conversation_id = ANY(locked)) IS TRUE;
    UPDATE scheduled_message s SET words = '{"content": ""}'
    WHERE s.id = ANY(gone) AND (s.conversation_id = ANY(locked)) IS TRUE;
    UPDATE message m SET expires_at = NULL
    WHERE m.id = ANY(gone) AND (m.conversation_id = ANY(locked)) IS TRUE AND m.is_deleted;

    -- 5. The messages. Their reactions and votes stay for a while (docs/decisions/0060).
    RETURN QUERY
    WITH deleted AS (
        UPDATE message m SET content = '', formatted_content = NULL, mentions = '{}', hashtags = '{}', metadata = NULL,
            reactions = '{}', status = 'deleted', is_deleted = true, deleted_at = now(), deleted_by = NULL,
            version = versions[array_position(gone, m.id)], updated_at = now(), payload = NULL, loud_mentions = '{}',
            link_preview = NULL, is_pinned = false, pinned_at = NULL, pinned_by = NULL, poll_counts = NULL,
            poll_voters = 0, poll_closed_at = NULL, expires_at = NULL, has_remains = EXISTS (
                SELECT FROM message_reaction r
                WHERE r.message_id = m.id AND (r.conversation_id = m.conversation_id) IS TRUE OFFSET 0
            ) OR EXISTS (
                SELECT FROM poll_vote v
                WHERE v.message_id = m.id AND (v.conversation_id = m.conversation_id) IS TRUE OFFSET 0
            )
        WHERE m.id = ANY(gone) AND (m.conversation_id = ANY(locked)) IS TRUE AND NOT m.is_deleted
        RETURNING m.conversation_id, m.thread_root_id, m.version, message_json(m) AS remains, (
            SELECT coalesce(c.settings ->> 'history' = 'from_joining', false) AND m.sent_version <= c.access_version
            FROM conversation c WHERE c.id = m.conversation_id
        ) AS is_from_before
    )
    SELECT NULL::uuid, d.remains, (
        SELECT r.reply_count FROM message r
        WHERE r.id = d.thread_root_id AND (r.conversation_id = d.conversation_id) IS TRUE
    ) + (
        SELECT count(*) FROM unnest(roots, versions) o (root, version)
        WHERE o.root = d.thread_root_id AND o.version > d.version
    )::integer, d.is_from_before
    FROM deleted d ORDER BY d.conversation_id, d.version;

    -- 6. Their words, after the messages. The job that adds words locks a message until it commits, so what it added
    --    before is seen here, and it adds none to a deleted message.
    DELETE FROM message_search s WHERE s.message_id = ANY(gone) AND (s.conversation_id = ANY(locked)) IS TRUE;

    RETURN QUERY SELECT a.id, NULL::json, NULL::integer, NULL::boolean FROM unnest(conversations) a (id)
    WHERE a.id <> ALL(locked);
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

-- Returns the columns that still contain any of these texts, for `openchat erase --verify`. `is_said` marks texts that
-- users wrote, and names of other users, where a match proves nothing. Hashes, keys and ids are left out, because they
-- may contain a short name by chance.
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

-- Inserts rows into a table, for `openchat import`. All rows have the same columns. Rows whose keys exist are skipped.
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

-- Access for those who read the database directly, such as analytics or a sync engine. Policies enforce the same rules
-- as the queries. The server connects as the owner of the tables, for whom policies do not apply. An administrator
-- creates a role and grants it access:
--
--     CREATE ROLE analyst LOGIN; SELECT grant_reader('analyst');
--
-- The role may only read, and sets the user on whose behalf: SET openchat.user_id = '…'.

CREATE FUNCTION current_user_id() RETURNS uuid LANGUAGE sql STABLE
    RETURN nullif(current_setting('openchat.user_id', true), '')::uuid;

-- Functions that run as the owner search for names in pg_catalog first and in the reader's pg_temp last. A path without
-- pg_temp would search it first (docs/decisions/0035).

-- Conditions of policies. They run as the owner, because a policy on conversation_participant would otherwise apply to
-- itself. Each is about the reader, so none reveals anything between other users.
-- Each costs less than any operator, so PostgreSQL evaluates it first. Comparisons are leakproof, and would otherwise
-- run on hidden rows before the policy. EXPLAIN (ANALYZE) would reveal their results (docs/decisions/0043).
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

-- Whether the reader has the permission `needed` in a conversation, by role or by the grant `permission`. It reads no
-- other columns of the row, because an error about one would reveal its value.
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

-- The policies of tables, one call each, so that no condition of a reader runs between the parts of a policy.
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

-- Whether the reader may see earlier contents of a message: as its sender, as a moderator, or if the settings show them
-- to everyone.
CREATE FUNCTION are_edits_shown(message uuid) RETURNS boolean LANGUAGE sql STABLE SECURITY DEFINER COST 0.0001
    SET search_path = pg_catalog, public, pg_temp
    RETURN is_part_shown(message, false) AND EXISTS (
        SELECT FROM message m JOIN conversation c ON c.id = m.conversation_id
        JOIN conversation_participant p ON p.conversation_id = c.id AND p.user_id = current_user_id()
        WHERE m.id = are_edits_shown.message AND shows_edits(c, p, m.sender_id)
    );

-- A poll that was deleted, or that a moderator has hidden, shows no votes, and a withdrawn vote is not shown. A deleted
-- message has no payload, so it is unknown whether its poll was anonymous.
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

-- Whether the reader may see reports and audit entries about a message. They may not if it was sent before they could
-- see messages. If the message does not exist, its version is unknown, and only readers of the whole history may.
CREATE FUNCTION is_past_shown(conversation uuid, message uuid) RETURNS boolean
    LANGUAGE sql STABLE SECURITY DEFINER COST 0.0001 SET search_path = pg_catalog, public, pg_temp
    RETURN message IS NULL OR is_visible(conversation, coalesce((
        SELECT m.sent_version FROM message m
        WHERE m.id = is_past_shown.message AND m.conversation_id = is_past_shown.conversation
    ), 1));

-- Moderators see reports, except those about their own messages.
CREATE FUNCTION is_report_shown(conversation uuid, message uuid) RETURNS boolean
    LANGUAGE sql STABLE SECURITY DEFINER COST 0.0001 SET search_path = pg_catalog, public, pg_temp
    RETURN is_allowed(conversation, 'moderator', 'can_delete_messages') AND is_past_shown(conversation, message)
        AND NOT EXISTS (
            SELECT FROM message m WHERE m.id = is_report_shown.message AND m.sender_id = current_user_id()
        );

CREATE FUNCTION is_entry_shown(chain uuid, message uuid) RETURNS boolean
    LANGUAGE sql STABLE SECURITY DEFINER COST 0.0001 SET search_path = pg_catalog, public, pg_temp
    RETURN is_allowed(chain, 'admin', '') AND is_past_shown(chain, message);

-- They do not see either that a report about their own message was dismissed.
CREATE FUNCTION is_action_shown(chain uuid, message uuid, action text) RETURNS boolean
    LANGUAGE sql STABLE SECURITY DEFINER COST 0.0001 SET search_path = pg_catalog, public, pg_temp
    RETURN is_entry_shown(chain, message) AND (action <> 'dismiss_report' OR is_report_shown(chain, message));

-- The author of a thread's root follows it from the first reply on. A reader who may not see the root sees only rows of
-- their own making: they replied, or chose to follow.
CREATE FUNCTION is_follow_shown(owner uuid, root uuid, has_replied boolean, user_version bigint) RETURNS boolean
    LANGUAGE sql STABLE SECURITY DEFINER COST 0.0001 SET search_path = pg_catalog, public, pg_temp
    RETURN owner = current_user_id() AND (has_replied OR user_version > 0 OR is_part_shown(root, true));

-- Nobody sees who blocked or muted them.
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
ALTER TABLE search_queue ENABLE ROW LEVEL SECURITY;
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

-- Columns of "user" that fewer users may read than the row. Policies restrict rows, and this view restricts columns.
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
    obstacle_of(conversation, conversation_participant, boolean),
    message_in(uuid, uuid), sender_part(uuid, uuid), lock_conversations(uuid[], boolean),
    send_messages(json, boolean, text), part_in(uuid, uuid),
    change_reactions(json, boolean, text, integer, integer), has_passed(text), change_votes(json, boolean, text),
    entrance(uuid, uuid, text), join_conversations(json, boolean, text, integer, integer),
    expire_messages(uuid[], uuid[], boolean, text),
    newest_matches(tsquery, uuid[], bigint[], text[], timestamptz, uuid, timestamptz, uuid, text[], uuid, uuid, integer,
        integer, integer) FROM PUBLIC;

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

-- Revokes from PUBLIC the functions with which any role can exhaust shared resources (the lock table, the disk, the WAL
-- that each replica reads, and transaction ids). Also revokes the languages, because a DO block can write anything to
-- the server's log. Migrations create functions in these languages, so the owner keeps them. Only a superuser can do
-- this. Templates and dumps copy these rights.
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

-- The other databases of the cluster that PUBLIC may connect to. All databases share one lock table, and the others are
-- not restricted as this one is. From there, a reader can stop the server (docs/decisions/0045-what-readers-hold.md).
CREATE FUNCTION open_databases() RETURNS SETOF text LANGUAGE sql STABLE SET search_path = pg_catalog, public, pg_temp
BEGIN ATOMIC
    SELECT d.datname::text FROM pg_database d CROSS JOIN aclexplode(coalesce(d.datacl, acldefault('d', d.datdba))) a
    WHERE d.datallowconn AND d.datname <> current_database() AND a.grantee = 0 AND a.privilege_type = 'CONNECT'
    ORDER BY d.datname;
END;
REVOKE EXECUTE ON FUNCTION open_databases() FROM PUBLIC;

-- Statistics contain samples of all rows, including hidden ones, and the estimates of EXPLAIN reveal them to a reader
-- (docs/decisions/0051-no-statistics.md). Keeps ANALYZE from collecting any for tables with policies, and deletes
-- existing ones.
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

-- Limits the resources of a reader, unless the role has its own limits. A reader can change the timeouts, but not the
-- number of connections, the size of temporary files or the log level. The limits apply to sessions of that role.
-- Without log_min_messages, the server's log would contain each failing statement and each plan that a reader requests.
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

-- Grants a role the rights of a reader, and no others on these tables. A repeated call revokes earlier grants.
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
