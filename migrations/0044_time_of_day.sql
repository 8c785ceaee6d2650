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
