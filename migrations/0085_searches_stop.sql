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
REVOKE EXECUTE ON FUNCTION newest_matches(tsquery, uuid[], bigint[], text[], timestamptz, uuid, timestamptz, uuid, text[],
    uuid, uuid, integer, integer, integer) FROM PUBLIC;
