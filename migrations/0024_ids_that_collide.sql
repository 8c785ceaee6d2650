-- Python's hash of an id. Whoever makes ids can make thousands with the same one, and a worker keeps dictionaries of the
-- conversations that somebody takes part in (docs/decisions/0050-ids-that-collide.md).
CREATE FUNCTION id_hash(id uuid) RETURNS bigint LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN (
        substring(('x' || replace(id::text, '-', ''))::bit(128) FROM 1 FOR 6)::bit(6)::integer::bigint
        + substring(('x' || replace(id::text, '-', ''))::bit(128) FROM 7 FOR 61)::bit(61)::bigint
        + substring(('x' || replace(id::text, '-', ''))::bit(128) FROM 68 FOR 61)::bit(61)::bigint
    ) % 2305843009213693951;
