-- A reply that has waited for its conversation has nobody follow a thread who was erased meanwhile.
-- Whether a user is not erased, as of now; nor will they be before the transaction of whoever asks is over.
CREATE FUNCTION is_unerased_now(account uuid) RETURNS boolean LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    PERFORM FROM public."user" u WHERE u.id = is_unerased_now.account AND u.erased_at IS NULL FOR KEY SHARE;
    RETURN FOUND;
END
$$;
REVOKE EXECUTE ON FUNCTION is_unerased_now(uuid) FROM PUBLIC;
