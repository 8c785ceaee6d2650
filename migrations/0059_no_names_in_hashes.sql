-- In hashes, keys and ids, which nobody wrote, a short name such as Ada or Cid stands by chance.
CREATE OR REPLACE FUNCTION traces(needles text[]) RETURNS TABLE (place text, is_said boolean, matches bigint)
    LANGUAGE plpgsql STABLE SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    opaque CONSTANT text[] := ARRAY['account.access_token', 'account.id_token', 'account.password',
        'account.refresh_token', 'attachment.access_token', 'conversation.invite_code', 'push_endpoint.auth',
        'push_endpoint.endpoint', 'server_key.value', 'session.token', 'verification.value'];
    id CONSTANT text := '[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}';
    whole CONSTANT text[] := ARRAY(SELECT n FROM unnest(needles) n WHERE n ~* id);
    field record;
BEGIN
    FOR field IN
        SELECT c.table_name, c.column_name FROM information_schema.columns c
        JOIN information_schema.tables t USING (table_schema, table_name)
        WHERE c.table_schema = 'public' AND t.table_type = 'BASE TABLE' AND c.data_type IN ('text', 'jsonb', 'ARRAY')
            AND c.udt_name <> '_uuid' AND c.table_name || '.' || c.column_name <> ALL (opaque)
        ORDER BY 1, 2
    LOOP
        EXECUTE format('SELECT count(*) FROM (SELECT %I::text AS words FROM public.%I) f WHERE words ILIKE ANY ($1)
            AND (regexp_replace(words, $2, '''', ''gi'') ILIKE ANY ($1) OR words ILIKE ANY ($3))',
            field.column_name, field.table_name) INTO matches USING needles, id, whole;
        IF matches > 0 THEN
            place := field.table_name || '.' || field.column_name;
            is_said := field.table_name IN ('user', 'account') OR place IN ('message.content', 'message.formatted_content', 'message.metadata',
                'message.payload', 'message.link_preview', 'message.hashtags', 'scheduled_message.words', 'draft.content',
                'message_edit.content', 'message_edit.formatted_content', 'conversation.title',
                'conversation.description', 'conversation.settings', 'report.reason');
            RETURN NEXT;
        END IF;
    END LOOP;
END
$$;
