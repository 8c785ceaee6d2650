-- Readers of the database write no WAL, export no snapshots and use up no ids of transactions.
CREATE OR REPLACE FUNCTION close_functions_to_public() RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    found record;
BEGIN
    FOR found IN
        SELECT p.oid::regprocedure AS name, pg_has_role(p.proowner, 'USAGE') AS is_mine
        FROM pg_proc p CROSS JOIN aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
        WHERE p.pronamespace = 'pg_catalog'::regnamespace AND a.grantee = 0 AND a.privilege_type = 'EXECUTE'
            AND (p.proname ~ '^pg_(try_)?advisory_(xact_)?lock' OR p.proname IN ('lo_creat', 'lo_create', 'lo_from_bytea',
                'lo_put', 'lowrite', 'lo_truncate', 'lo_truncate64', 'pg_logical_emit_message', 'pg_export_snapshot',
                'pg_current_xact_id', 'txid_current'))
    LOOP
        IF NOT found.is_mine THEN
            RAISE WARNING 'advisory locks, large objects and WAL stay open to everybody: a superuser must call'
                ' close_functions_to_public()';
            RETURN;
        END IF;
        EXECUTE format('REVOKE EXECUTE ON FUNCTION %s FROM PUBLIC', found.name);
    END LOOP;
END
$$;

-- Where somebody reads, for everybody; without a superuser's rights, the function warns.
DO $$
BEGIN
    IF EXISTS (
        SELECT FROM pg_class c CROSS JOIN aclexplode(c.relacl) a
        WHERE c.oid = 'user_profile'::regclass AND a.grantee <> c.relowner
    ) THEN
        PERFORM close_functions_to_public();
    END IF;
END
$$;
