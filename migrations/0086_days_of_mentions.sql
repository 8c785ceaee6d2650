-- The newest mentions of a user are found by their days (docs/decisions/0049).
-- Whether a search vector has mentions, also of roles. PL/pgSQL, because the planner must not see its condition, which
-- message_search_words_idx would serve by reading all mentions. Not PARALLEL SAFE, because the start of parallel workers
-- takes longer than the feed's read of this index.
CREATE FUNCTION has_mentions(words tsvector) RETURNS boolean LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    RETURN words @@ '''m:'':*'::tsquery;
END
$$;
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
