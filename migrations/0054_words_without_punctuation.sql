-- Text as its words are found: without punctuation, as queries are. PostgreSQL's parser tries addresses, paths and tags
-- at each word, up to the next space: 10,000 characters of `1a@1a@…` took seconds.
CREATE FUNCTION unpunctuated(text text) RETURNS text LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN translate(text, '!"#$%&''()*+,-./:;<=>?@[\]^_`{|}~', repeat(' ', 32));
-- Messages that were sent before are found by their old words until `openchat reindex`.
CREATE OR REPLACE FUNCTION search_words(conversation uuid, content text, payload jsonb, mentions uuid[], loud text[], hashtags text[])
    RETURNS tsvector LANGUAGE sql STABLE PARALLEL SAFE
    RETURN to_tsvector(unpunctuated(concat_ws(' ', content, payload ->> 'name', payload ->> 'alt',
            payload -> 'options')))
        || array_to_tsvector(ARRAY['c:' || conversation] || prefixed('m:', mentions::text[]) || prefixed('m:', loud)
            || prefixed('h:', hashtags));
