CREATE INDEX CONCURRENTLY user_words_idx ON "user"
    USING gin (to_tsvector('simple', unpunctuated(name || ' ' || coalesce(display_name, ''))));
CREATE INDEX CONCURRENTLY conversation_words_idx ON conversation
    USING gin (to_tsvector('simple', unpunctuated(coalesce(title, '') || ' ' || coalesce(description, ''))))
    WHERE is_public;
