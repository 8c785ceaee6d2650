"""A reader may create objects with the names of the database's own objects, and none of them runs as the owner."""

import re
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from protocol import client, server
from protocol.ids import uuid7
from protocol.payloads import Poll
from tests.world import World, sent

PATH = "pg_catalog, public, pg_temp"
SHADOWS = "shadows"
# Objects of every kind that a reader could call, which must not be found by name.
TRAP = f"""
CREATE FUNCTION {SHADOWS}.trap() RETURNS boolean LANGUAGE plpgsql AS
$$ BEGIN RAISE EXCEPTION 'a shadow ran as %', current_user; END $$
"""
RELATIONS = f"""
SELECT format('CREATE VIEW {{schema}}.%I AS SELECT * FROM (SELECT %s FROM {SHADOWS}.trap() t WHERE t OFFSET 0) x',
    c.relname,
    string_agg(format('NULL::%s AS %I', format_type(a.atttypid, a.atttypmod), a.attname), ', ' ORDER BY a.attnum))
FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'v') GROUP BY c.relname
"""
# Functions of pg_catalog whose argument types the schema uses. A function for "any" cannot be created.
FUNCTIONS = f"""
WITH ours AS MATERIALIZED (
    SELECT string_agg(pg_get_functiondef(oid), ' ') AS source
    FROM pg_proc WHERE pronamespace = 'public'::regnamespace
)
SELECT DISTINCT format('CREATE FUNCTION {SHADOWS}.%I(%s) RETURNS %s LANGUAGE plpgsql AS
    $f$ BEGIN PERFORM {SHADOWS}.trap(); RETURN NULL; END $f$', p.proname,
    array_to_string(ARRAY(SELECT format_type(t, NULL) FROM unnest(p.proargtypes) WITH ORDINALITY u (t, n) ORDER BY n),
        ', '),
    format_type(p.prorettype, NULL))
FROM pg_proc p, ours
WHERE p.prokind = 'f' AND NOT p.proretset AND p.provariadic = 0
    AND (p.pronamespace = 'public'::regnamespace
        OR (p.pronamespace = 'pg_catalog'::regnamespace AND strpos(ours.source, p.proname || '(') > 0))
    AND NOT EXISTS (SELECT FROM unnest(p.proargtypes::oid[] || p.prorettype) u JOIN pg_type t ON t.oid = u
        WHERE t.typtype = 'p')
"""
OPERATORS = f"""
SELECT format('CREATE FUNCTION {SHADOWS}.%I(%s, %s) RETURNS %s LANGUAGE plpgsql AS
    $f$ BEGIN PERFORM {SHADOWS}.trap(); RETURN NULL; END $f$;
    CREATE OPERATOR {SHADOWS}.%s (FUNCTION = {SHADOWS}.%I, LEFTARG = %s, RIGHTARG = %s)',
    'op' || o.oid, format_type(o.oprleft, NULL), format_type(o.oprright, NULL), format_type(o.oprresult, NULL),
    o.oprname, 'op' || o.oid, format_type(o.oprleft, NULL), format_type(o.oprright, NULL))
FROM pg_operator o JOIN pg_type l ON l.oid = o.oprleft JOIN pg_type r ON r.oid = o.oprright
WHERE o.oprnamespace = 'pg_catalog'::regnamespace AND l.typtype <> 'p' AND r.typtype <> 'p'
    AND l.typname IN ('uuid', 'text', 'bool', 'int4', 'int8', 'jsonb', 'json', 'timestamptz', '_uuid', '_text')
    AND r.typname IN ('uuid', 'text', 'bool', 'int4', 'int8', 'jsonb', 'json', 'timestamptz', '_uuid', '_text')
"""
# Types are looked up like tables: in `pg_temp` before pg_catalog, unless the path names it.
TYPES = """
SELECT format('CREATE TYPE {schema}.%I AS (shadow boolean)', t)
FROM unnest(ARRAY['record', 'uuid', 'text', 'bigint', 'int8', 'bool', 'boolean', 'jsonb', 'json', 'bytea',
    'timestamptz']) t
"""
READING = {
    "faces": 'SELECT id FROM public."user"',
    "profiles": "SELECT id FROM public.user_profile",
    "sessions": "SELECT id FROM public.session",
    "conversations": "SELECT id FROM public.conversation",
    "participants": "SELECT id FROM public.conversation_participant",
    "messages": "SELECT id FROM public.message",
    "reactions": "SELECT user_id FROM public.message_reaction",
    "edits": "SELECT id FROM public.message_edit",
    "votes": "SELECT user_id FROM public.poll_vote",
    "follows": "SELECT root_id FROM public.thread_follow",
    "stars": "SELECT message_id FROM public.message_star",
    "drafts": "SELECT content FROM public.draft",
    "scheduled": "SELECT id FROM public.scheduled_message",
    "attachments": "SELECT id FROM public.attachment",
    "relationships": "SELECT id FROM public.user_relationship",
    "reports": "SELECT id FROM public.report",
    "entries": "SELECT action FROM public.audit_entry",
    "mine": "SELECT public.is_mine(user_id) FROM public.draft",
    "me": "SELECT public.current_user_id()",
    "may": "SELECT public.may_i('write', id) FROM public.\"user\"",
    "takes part": "SELECT public.is_participant(id) FROM public.conversation",
    "allowed": "SELECT public.is_allowed(id, 'admin', 'can_remove_members') FROM public.conversation",
    "visible": "SELECT public.is_visible(conversation_id, sent_version) FROM public.message",
    "past": "SELECT public.is_past_shown(conversation_id, id) FROM public.message",
    "reported": "SELECT public.is_report_shown(conversation_id, id) FROM public.message",
    "noted": "SELECT public.is_entry_shown(conversation_id, id) FROM public.message",
    "acted": "SELECT public.is_action_shown(conversation_id, id, 'moderate') FROM public.message",
    "followed": "SELECT public.is_follow_shown(user_id, root_id, has_replied, user_version) FROM public.thread_follow",
    "shown": "SELECT public.are_edits_shown(id) FROM public.message",
}
PATHS = (
    "pg_temp, shadows, public",
    "shadows, pg_temp, pg_catalog, public",
    "pg_temp, shadows, pg_catalog, public",
)


@pytest.fixture
async def role(world: World) -> AsyncIterator[str]:
    """A reader that may create objects, despite the rights that the schema revokes."""
    name = f"reader_{uuid7().hex}"
    await world.db.execute(f"CREATE ROLE {name} LOGIN; SELECT grant_reader('{name}')")
    await world.db.execute(f"CREATE SCHEMA {SHADOWS} AUTHORIZATION {name}")
    database = await world.db.fetchval("SELECT current_database()")
    await world.db.execute(
        f"GRANT TEMPORARY ON DATABASE {database} TO {name}; GRANT USAGE ON LANGUAGE plpgsql TO {name}"
    )
    yield name
    await world.db.execute(f"DROP OWNED BY {name}; DROP ROLE {name}")


async def read(db: "asyncpg.Connection[asyncpg.Record]", path: str) -> dict[str, list[Any]]:
    """Return all rows that Ada may read, with `path` as the search path."""
    await db.execute(f"SET search_path = {path}")
    return {name: sorted(row[0] for row in await db.fetch(query)) for name, query in READING.items()}


async def shadow(db: "asyncpg.Connection[asyncpg.Record]") -> None:
    """Create an object with the name of every existing one, in a schema of the reader and in `pg_temp`."""
    await db.execute(TRAP)
    made = [[row[0] for row in await db.fetch(query)] for query in (RELATIONS, FUNCTIONS, OPERATORS, TYPES)]
    assert all(len(statements) > 10 for statements in made)
    for statements in made:
        for schema in (SHADOWS, "pg_temp") if "{schema}" in statements[0] else ("",):
            await db.execute(";".join(statements).replace("{schema}", schema))


async def test_objects_of_a_reader_never_run_as_the_owner(world: World, role: str) -> None:
    ada, charles, mary = await world.users("Ada", "Charles", "Mary")
    one, other, third = await world.connect(ada), await world.connect(charles), await world.connect(mary)
    group = await world.group(one, charles, mary)
    await sent(one, await world.channel(one), "Alone")
    place: dict[str, Any] = {
        "conversation_id": group, "message_id": await sent(other, group, "Tea?", payload=Poll(options=["Yes", "No"]))
    }  # fmt: skip
    said: dict[str, Any] = {"conversation_id": group, "message_id": await sent(other, group, "What?")}
    for who, frame in (
        (other, client.Vote(**place, options=[0])), (other, client.React(**said, emoji="👍")),
        (other, client.Edit(**said, content="Why?")), (one, client.Star(**said)),
        (one, client.SetDraft(conversation_id=group, content="I thi")), (one, client.FollowThread(**said)),
        (third, client.ReportMessage(**said, reason="Rude")), (one, client.Follow(user_id=charles.id)),
        (third, client.UpdateProfile(is_private=True)), (other, client.Block(user_id=mary.id)),
        (one, client.SetRole(conversation_id=group, user_id=charles.id, role="admin")),
    ):  # fmt: skip
        assert not isinstance(await who.ask(frame), server.Error), frame
    db = await asyncpg.connect(world.settings.database_url)
    try:
        await db.execute(f"SET ROLE {role}")
        await db.execute("SELECT set_config('openchat.user_id', $1, false)", str(ada.id))
        expected = await read(db, '"$user", public')
        assert all(seen for name, seen in expected.items() if name not in {"scheduled", "attachments"})
        await shadow(db)
        for path in PATHS:
            assert await read(db, path) == expected
    finally:
        await db.close()


async def test_reader_cannot_create_casts(world: World, role: str) -> None:
    await world.db.execute(f"SET ROLE {role}")
    for source, target in (("jsonb", "boolean"), ("text", "boolean"), ("public.message", "text")):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await world.db.execute(f"CREATE CAST ({source} AS {target}) WITH INOUT")
    await world.db.execute("RESET ROLE")


async def test_functions_that_run_as_the_owner_have_a_search_path(world: World) -> None:
    """Functions that resolve names at run time also have one, or only roles with a path may call them."""
    functions = await world.db.fetch("""
        SELECT p.proname, p.prosrc, p.prosecdef, p.proconfig, p.prosqlbody IS NULL AS is_text,
            EXISTS (SELECT FROM aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a WHERE a.grantee = 0)
                AS is_for_all
        FROM pg_proc p WHERE p.pronamespace = 'public'::regnamespace
    """)
    assert {function["proname"] for function in functions if function["prosecdef"]} == {
        "may_i", "is_participant", "is_allowed", "is_visible", "are_edits_shown", "is_message_shown", "is_part_shown",
        "is_vote_shown", "is_membership_shown", "is_relationship_shown", "is_mine", "is_past_shown", "is_report_shown",
        "is_entry_shown", "is_action_shown", "is_follow_shown",
    }  # fmt: skip
    for function in functions:
        name = function["proname"]
        path = [one for one in function["proconfig"] or [] if one.startswith("search_path=")] or None
        assert path in (None, [f"search_path={PATH}"]), name
        assert path or not function["prosecdef"], name
        assert not (function["is_for_all"] and (function["prosecdef"] or function["is_text"])), name
        if function["is_text"] and not path:  # a path would slow down `may`
            ours = "|".join(one["proname"] for one in functions)
            names = re.findall(
                rf"\b(?:FROM|JOIN|INTO|UPDATE) (?!them|theirs|\()\S+|(?<!\w)(?:public\.)?(?:{ours})\(",
                function["prosrc"],
            )
            assert names, name
            assert [one for one in names if "public." not in one] == [], name


async def test_role_that_bypasses_policies_cannot_be_a_reader(world: World) -> None:
    name = f"reader_{uuid7().hex}"
    for make in ("SUPERUSER", "BYPASSRLS"):
        await world.db.execute(f"CREATE ROLE {name} {make}")
        with pytest.raises(asyncpg.InsufficientPrivilegeError, match="not held by policies"):
            await world.db.execute("SELECT grant_reader($1)", name)
        await world.db.execute(f"DROP ROLE {name}")
    await world.db.execute(f"CREATE ROLE {name}; GRANT CREATE ON SCHEMA public TO {name}")
    with pytest.raises(asyncpg.InsufficientPrivilegeError, match="create objects"):
        await world.db.execute("SELECT grant_reader($1)", name)
    await world.db.execute(f"DROP OWNED BY {name}; DROP ROLE {name}")


async def test_grants_to_public_are_revoked(world: World) -> None:
    """Templates, dumps and upgrades from before PostgreSQL 15 contain such grants."""
    name = f"reader_{uuid7().hex}"
    database = await world.db.fetchval("SELECT current_database()")
    await world.db.execute(f"""
        CREATE ROLE {name}; GRANT CREATE ON SCHEMA public TO PUBLIC; GRANT TEMPORARY ON DATABASE {database} TO PUBLIC
    """)
    may = """SELECT has_database_privilege($1, current_database(), 'TEMPORARY'),
        has_schema_privilege($1, 'public', 'CREATE')"""
    assert tuple(await world.db.fetchrow(may, name) or ()) == (True, True)
    await world.db.execute("SELECT grant_reader($1)", name)
    assert tuple(await world.db.fetchrow(may, name) or ()) == (False, False)
    await world.db.execute(f"DROP OWNED BY {name}; DROP ROLE {name}")
