-- PL/pgSQL would resolve the names in its body at each call, by the path of the caller.
CREATE OR REPLACE FUNCTION has_mentions(words tsvector) RETURNS boolean LANGUAGE sql IMMUTABLE
    RETURN (SELECT words @@ '''m:'':*'::tsquery);
