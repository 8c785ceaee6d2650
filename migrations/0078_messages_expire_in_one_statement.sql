-- Messages expire in one statement for several of them (docs/decisions/0060).

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
    DELETE FROM message_search s WHERE s.message_id = ANY(gone) AND (s.conversation_id = ANY(locked)) IS TRUE;
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

    RETURN QUERY SELECT a.id, NULL::json, NULL::integer, NULL::boolean FROM unnest(conversations) a (id)
    WHERE a.id <> ALL(locked);
END
$$;

REVOKE EXECUTE ON FUNCTION expire_messages(uuid[], uuid[], boolean, text) FROM PUBLIC;
