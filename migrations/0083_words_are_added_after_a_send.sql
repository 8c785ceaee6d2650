-- Messages are added to the search index after they are sent, by a job (docs/decisions/0085).
-- Workers of earlier versions call send_messages(), too. What they send waits for a worker of this version.

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
ALTER TABLE search_queue ENABLE ROW LEVEL SECURITY;

CREATE OR REPLACE FUNCTION send_messages(input json, passes_held boolean, patience text) RETURNS TABLE (
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

CREATE OR REPLACE FUNCTION expire_messages(conversations uuid[], ids uuid[], passes_held boolean, patience text) RETURNS TABLE (
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
