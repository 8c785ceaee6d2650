"""Moderation: hidden messages, reports, reviews, and an audit log that reveals tampering."""

from itertools import product
from typing import Any
from uuid import UUID

import pytest

from protocol import client, server
from protocol.errors import ErrorCode
from protocol.ids import ConversationId, MessageId, ReportId, uuid7
from protocol.payloads import Poll
from protocol.roles import rank
from protocol.values import Role
from prove.client import Client
from server.queries import audit, checks
from tests.world import World, refused, sent


class Scene:
    """A channel of a moderator, a rude member and a bystander."""

    def __init__(self, world: World, about: ConversationId, moderator: Client, rude: Client, bystander: Client) -> None:
        self.world, self.about = world, about
        self.moderator, self.rude, self.bystander = moderator, rude, bystander


@pytest.fixture
async def scene(world: World) -> Scene:
    ada, charles, mary = await world.users("Ada", "Charles", "Mary")
    moderator, rude, bystander = await world.connect(ada), await world.connect(charles, 1), await world.connect(mary, 1)
    about = await world.channel(moderator, is_public=True)
    for one in (rude, bystander):
        await one.call(client.Join(conversation_id=about))
    return Scene(world, about, moderator, rude, bystander)


async def test_hidden_message_is_visible_only_to_its_sender_and_moderators(scene: Scene) -> None:
    said = await sent(scene.rude, scene.about, "Something rude")
    place: dict[str, Any] = {"conversation_id": scene.about, "message_id": said}
    with refused(ErrorCode.FORBIDDEN, None):
        await scene.bystander.call(client.Moderate(**place, reason="Rude"))
    moderate = client.Moderate(**place, reason="Rude")
    first = await scene.moderator.call(moderate, server.Changed)
    assert await scene.moderator.call(moderate, server.Changed) == first
    for one in (scene.rude, scene.bystander):
        hidden = (await one.event(server.MessageEdited, lambda event: event.message.is_moderated)).message
        assert (hidden.content, hidden.moderation_reason) == ("", "Rude")
        assert hidden.moderated_by == scene.moderator.ready.user.id
    for one, withheld in ((scene.moderator, "Something rude"), (scene.rude, "Something rude"), (scene.bystander, None)):
        got = await one.call(client.GetMessage(**place), server.OneMessage)
        assert (got.message.content, got.withheld) == ("", withheld)
        page = await one.call(client.History(conversation_id=scene.about), server.MessagePage)
        assert page.withheld.get(said) == withheld
    with refused(ErrorCode.FORBIDDEN, "message_id"):
        await scene.rude.call(client.Edit(**place, content="Something ruder"))
    with refused(ErrorCode.NOT_FOUND, "message_id"):
        await scene.bystander.call(client.ListEdits(**place))
    await scene.moderator.call(client.Unmoderate(**place))
    shown = await scene.bystander.event(server.MessageEdited, lambda event: not event.message.is_moderated)
    assert shown.message.content == "Something rude"


async def test_moderators_review_reports(scene: Scene) -> None:
    said = [await sent(scene.rude, scene.about, f"Rude {number}") for number in range(3)]
    for one in said:
        frame = client.ReportMessage(conversation_id=scene.about, message_id=one, reason="This is rude")
        for _ in range(2):
            await scene.bystander.call(frame)
    with refused(ErrorCode.FORBIDDEN, "message_id"):
        await scene.rude.call(client.ReportMessage(conversation_id=scene.about, message_id=said[0], reason="Me"))
    with refused(ErrorCode.FORBIDDEN, None):
        await scene.bystander.call(client.ListReports(conversation_id=scene.about))
    page = await scene.moderator.call(client.ListReports(conversation_id=scene.about, limit=2), server.ReportPage)
    assert [report.message_id for report in page.reports] == said[:2]
    assert (page.reports[0].content, page.reports[0].reason) == ("Rude 0", "This is rude")
    rest = await scene.moderator.call(
        client.ListReports(conversation_id=scene.about, after=page.after), server.ReportPage
    )
    assert [report.message_id for report in rest.reports] == said[2:]
    dismiss = client.DismissReport(conversation_id=scene.about, report_id=page.reports[0].id)
    with refused(ErrorCode.FORBIDDEN, None):
        await scene.bystander.call(dismiss)
    await scene.moderator.call(dismiss)
    await scene.moderator.call(dismiss)
    with refused(ErrorCode.NOT_FOUND, "report_id"):
        await scene.moderator.call(client.DismissReport(conversation_id=scene.about, report_id=ReportId(uuid7())))
    await scene.moderator.call(client.Moderate(conversation_id=scene.about, message_id=said[1], reason="Rude"))
    for status, left in (("open", [said[2]]), ("dismissed", [said[0]]), ("upheld", [said[1]])):
        listed = client.ListReports(conversation_id=scene.about, status=status)  # type: ignore[arg-type]
        found = await scene.moderator.call(listed, server.ReportPage)
        assert [report.message_id for report in found.reports] == left


async def test_audit_log_records_the_use_of_permissions(scene: Scene) -> None:
    rude = scene.rude.ready.user.id
    said = await sent(scene.rude, scene.about)
    for frame in (
        client.SetRole(conversation_id=scene.about, user_id=rude, role="guest"),
        client.SetPermissions(conversation_id=scene.about, user_id=rude, can_pin_messages=True),
        client.Moderate(conversation_id=scene.about, message_id=said, reason="Rude"),
        client.Delete(conversation_id=scene.about, message_id=said),
        client.UpdateConversation(conversation_id=scene.about, title="Manners"),
        client.RemoveParticipant(conversation_id=scene.about, user_id=rude, ban=True),
        client.Unban(conversation_id=scene.about, user_id=rude),
        client.SetInviteCode(conversation_id=scene.about),
    ):
        await scene.moderator.call(frame)
    listed = client.ListAudit(conversation_id=scene.about, limit=5)
    with refused(ErrorCode.FORBIDDEN, None):
        await scene.bystander.call(listed)
    page = await scene.moderator.call(listed, server.AuditPage)
    rest = await scene.moderator.call(
        client.ListAudit(conversation_id=scene.about, after=page.after or 0), server.AuditPage
    )
    entries = [*page.entries, *rest.entries]
    assert [(entry.number, entry.action) for entry in entries] == list(enumerate([
        "set_role", "set_permissions", "moderate", "delete_message", "update_conversation", "ban", "unban",
        "set_invite_code",
    ], start=1))  # fmt: skip
    assert entries[0].details == {"from": "member", "to": "guest"}
    assert (entries[2].user_id, entries[2].message_id) == (rude, said)
    assert {entry.actor_id for entry in entries} == {scene.moderator.ready.user.id}
    assert [entry.previous_hash for entry in entries] == ["", *(entry.hash for entry in entries[:-1])]


@pytest.mark.parametrize(
    "tampering",
    [
        "UPDATE audit_entry SET action = 'nothing' WHERE number = 2",
        "UPDATE audit_entry SET created_at = now() - interval '1 day' WHERE number = 2",
        "UPDATE audit_entry SET actor_id = user_id WHERE number = 2",
        "DELETE FROM audit_entry WHERE number = 2",
        "DELETE FROM audit_entry WHERE number = 1",
        "UPDATE audit_entry SET details = '{}', hash = previous_hash WHERE number = 2",
    ],
)
async def test_audit_log_reveals_tampering(scene: Scene, tampering: str) -> None:
    for number in range(4):
        await scene.moderator.call(client.UpdateConversation(conversation_id=scene.about, title=f"Title {number}"))
    assert await audit.broken(scene.world.db, scene.about) is None
    await scene.world.db.execute("SET session_replication_role = replica; " + tampering)
    assert await audit.broken(scene.world.db, scene.about) in {2, 3}


AGE = """
UPDATE audit_entry e SET created_at = e.created_at - interval '2 years', previous_hash = $3
WHERE chain = $1 AND number = $2
"""
SEAL = "UPDATE audit_entry e SET hash = audit_hash(e) WHERE chain = $1 AND number = $2 RETURNING hash"


async def test_old_audit_entries_are_deleted_and_the_chain_stays_valid(scene: Scene) -> None:
    db, app = scene.world.db, scene.world.workers[0].app

    async def rename(title: str) -> None:
        await scene.moderator.call(client.UpdateConversation(conversation_id=scene.about, title=title))

    async def age(count: int) -> None:
        """Date the first `count` entries back by two years, and recompute all hashes."""
        await db.execute("SET session_replication_role = replica")
        before = await db.fetchval("SELECT audit_hash FROM conversation WHERE id = $1", scene.about)
        rows = await db.fetch("SELECT number FROM audit_entry WHERE chain = $1 ORDER BY number", scene.about)
        for place, (number,) in enumerate(rows):
            await db.execute(AGE.replace("2 years", "2 years" if place < count else "0"), scene.about, number, before)
            before = await db.fetchval(SEAL, scene.about, number)
        await db.execute("SET session_replication_role = origin")
        assert await audit.broken(db, scene.about) is None

    async def left() -> list[int]:
        await app.background.forget_audit()
        assert await audit.broken(db, scene.about) is None
        assert [check.name for check in checks.CHECKS if (await checks.run_all(db, check)).number] == []
        page = await scene.moderator.call(client.ListAudit(conversation_id=scene.about), server.AuditPage)
        return [entry.number for entry in page.entries]

    for number in range(3):
        await rename(f"Title {number}")
    assert await left() == [1, 2, 3]
    await age(2)
    assert await left() == [3]
    await rename("Title 4")
    await age(2)
    assert await left() == []
    assert await audit.count(db, scene.about) == 4
    await rename("Title 5")
    await rename("Title 6")
    assert await left() == [5, 6]
    async with db.transaction():
        await db.execute("DELETE FROM audit_entry WHERE chain = $1 AND number = 5", scene.about)
        assert await audit.broken(db, scene.about) == 6


async def test_only_administrators_read_the_servers_log_and_all_reports(scene: Scene) -> None:
    said = await sent(scene.rude, scene.about)
    await scene.bystander.call(client.ReportMessage(conversation_id=scene.about, message_id=said, reason="Rude"))
    outsider = await scene.world.connect(admin := await scene.world.user("Admin"))
    for frame in (client.ListAudit(), client.ListReports()):
        with refused(ErrorCode.FORBIDDEN, "conversation_id"):
            await outsider.call(frame)
    await scene.world.db.execute('UPDATE "user" SET is_admin = true WHERE id = $1', admin.id)
    reports = await outsider.call(client.ListReports(), server.ReportPage)
    assert [report.message_id for report in reports.reports] == [said]
    assert (await outsider.call(client.ListAudit(), server.AuditPage)).entries == []
    with refused(ErrorCode.NOT_FOUND, "conversation_id"):
        await outsider.call(client.History(conversation_id=scene.about))


ACTORS: dict[str, Role] = {
    "owner": "owner", "admin": "admin", "moderator": "moderator", "member, permitted": "member",
    "guest, permitted": "guest",
}  # fmt: skip
SENDERS: dict[str, Role] = {
    "a guest": "guest", "a member": "member", "a moderator": "moderator", "an admin": "admin", "ex-admin": "admin",
}  # fmt: skip
ROLES = {**ACTORS, **SENDERS}
OWN = {
    "moderate": (ErrorCode.FORBIDDEN, "message_id"), "unmoderate": (ErrorCode.FORBIDDEN, "message_id"),
    "dismiss": (ErrorCode.NOT_FOUND, "report_id"), "delete": None, "close": None,
}  # fmt: skip
"""Acts on the messages of others that a role or permission allows, except pins, and the refusal for one's own message.
"""


class RolesChannel:
    """A channel of everyone in `ROLES`.

    Each has sent a poll for each actor and act; those for `dismiss` are reported.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.of: dict[str, Client] = {}
        self.about: ConversationId
        self.said: dict[tuple[str, str, str], MessageId] = {}
        self.reports: dict[MessageId, ReportId] = {}

    async def begin(self) -> None:
        people = await self.world.users(*ROLES)
        self.of = {name: await self.world.connect(who) for name, who in zip(ROLES, people, strict=True)}
        self.about = await self.world.channel(self.of["owner"], is_public=True)
        for name, role in list(ROLES.items())[1:]:
            place: dict[str, Any] = {"conversation_id": self.about, "user_id": self.of[name].ready.user.id}
            await self.of[name].call(client.Join(conversation_id=self.about))
            await self.of["owner"].call(client.SetRole(**place, role=role))  # type: ignore[arg-type]
            if name.endswith("permitted"):
                await self.of["owner"].call(client.SetPermissions(**place, can_delete_messages=True))
        reporter = await self.world.connect(await self.world.user("Reporter"), 1)
        await reporter.call(client.Join(conversation_id=self.about))
        for actor, sender, act in product(ACTORS, ROLES, OWN):
            said = await sent(self.of[sender], self.about, payload=Poll(options=["Yes", "No"]))
            self.said[actor, sender, act] = said
            if act == "dismiss":
                await reporter.call(client.ReportMessage(conversation_id=self.about, message_id=said, reason="Rude"))
            if act == "unmoderate" and sender != "owner":
                await self.of["owner"].call(self.frame("moderate", said))
        await self.of["ex-admin"].call(client.Leave(conversation_id=self.about))
        reports = "SELECT message_id, id FROM report WHERE conversation_id = $1"
        self.reports = {row[0]: row[1] for row in await self.world.db.fetch(reports, self.about)}

    def frame(self, act: str, said: MessageId) -> client.Frame:
        at: dict[str, Any] = {"conversation_id": self.about, "message_id": said}
        match act:
            case "moderate":
                return client.Moderate(**at, reason="Rude")
            case "unmoderate":
                return client.Unmoderate(**at)
            case "delete":
                return client.Delete(**at)
            case "close":
                return client.ClosePoll(**at)
            case _:
                return client.DismissReport(conversation_id=self.about, report_id=self.reports[said])

    def about_others(self, name: str) -> set[ReportId]:
        """Return the reports about messages of all others."""
        said = {self.said[actor, sender, "dismiss"] for actor, sender in product(ACTORS, ROLES) if sender != name}
        return {self.reports[one] for one in said}

    async def listed(self, name: str, conversation_id: ConversationId | None) -> set[ReportId]:
        """Read pages of one report. The pages show no trace of reports that are hidden from the reader."""
        listed: set[ReportId] = set()
        after: ReportId | None = None
        while True:
            frame = client.ListReports(conversation_id=conversation_id, limit=1, after=after)
            page = await self.of[name].call(frame, server.ReportPage)
            (report,) = page.reports
            listed |= {report.id} if report.conversation_id == self.about else set()
            if (after := page.after) is None:
                return listed
            assert after == report.id

    async def dismissed(self, name: str) -> set[MessageId | None]:
        """Return the messages about which the log has a dismissed report."""
        page = await self.of[name].call(client.ListAudit(conversation_id=self.about, limit=100), server.AuditPage)
        assert page.after is None
        return {entry.message_id for entry in page.entries if entry.action == "dismiss_report"}


@pytest.fixture
async def roles_channel(world: World) -> RolesChannel:
    roles_channel = RolesChannel(world)
    await roles_channel.begin()
    return roles_channel


async def test_moderators_cannot_act_on_their_own_messages_or_those_of_higher_roles(
    roles_channel: RolesChannel,
) -> None:
    """Every actor tries each act on a message of every sender (docs/roles.md)."""
    wrong = []
    for (actor, sender, act), said in roles_channel.said.items():
        answer = await roles_channel.of[actor].ask(roles_channel.frame(act, said))
        found = (answer.code, answer.path) if isinstance(answer, server.Error) else None
        expected = OWN[act] if actor == sender else None
        if sender != "ex-admin" and rank(ROLES[sender]) > rank(ROLES[actor]):
            expected = (ErrorCode.FORBIDDEN, "report_id" if act == "dismiss" else "message_id")
        if found != expected:
            wrong.append((actor, sender, act, found, expected))
    assert wrong == []


MANY = """
WITH people AS (
    INSERT INTO "user" (id, name, email) SELECT gen_random_uuid(), 'Many', gen_random_uuid() || '@example.org'
    FROM generate_series(1, 1000) RETURNING id
)
INSERT INTO report (id, conversation_id, message_id, reporter_id, reason)
SELECT ('ffff' || substr(people.id::text, 5))::uuid, m.conversation_id, m.id, people.id, 'Rude'
FROM people, message m WHERE m.id = $1
"""


async def test_reported_user_sees_neither_reports_nor_reporters(roles_channel: RolesChannel) -> None:
    """Frames, the frames of administrators, and direct reads of the database show no report about the reader.

    The same holds for the log.
    """
    db = roles_channel.world.db
    for name in ACTORS:
        assert await roles_channel.listed(name, roles_channel.about) == roles_channel.about_others(name), name
    await db.execute('UPDATE "user" SET is_admin = true WHERE id = $1', roles_channel.of["a member"].ready.user.id)
    assert await roles_channel.listed("a member", None) == roles_channel.about_others("a member")
    reader = f"reader_{uuid7().hex}"
    await db.execute(f"CREATE ROLE {reader}; SELECT grant_reader('{reader}'); SET ROLE {reader}")
    for name in ACTORS:
        await db.execute("SELECT set_config('openchat.user_id', $1, false)", str(roles_channel.of[name].ready.user.id))
        shown = {
            row[0] for row in await db.fetch("SELECT id FROM report WHERE conversation_id = $1", roles_channel.about)
        }
        assert shown == roles_channel.about_others(name), name
    await db.execute("RESET ROLE")
    about = {name: roles_channel.said["owner", name, "dismiss"] for name in ("admin", "an admin", "a member")}
    for said in about.values():
        await roles_channel.of["owner"].call(roles_channel.frame("dismiss", said))
    for name in ("owner", "admin", "an admin"):
        expected = {said for sender, said in about.items() if sender != name}
        assert await roles_channel.dismissed(name) == expected, name
        await db.execute("SELECT set_config('openchat.user_id', $1, false)", str(roles_channel.of[name].ready.user.id))
        await db.execute(f"SET ROLE {reader}")
        rows = await db.fetch("SELECT message_id FROM audit_entry WHERE action = 'dismiss_report'")
        assert {row[0] for row in rows} == expected, name
        await db.execute("RESET ROLE")
    await db.execute(f"DROP OWNED BY {reader}; DROP ROLE {reader}")
    # A page reads a bounded number of reports, and the next one continues after them.
    await db.execute(MANY, roles_channel.said["owner", "admin", "delete"])
    listed = client.ListReports(conversation_id=roles_channel.about, after=ReportId(UUID(int=0xFFFE << 112)))
    page = await roles_channel.of["admin"].call(listed, server.ReportPage)
    assert page.reports == []
    rest = client.ListReports(conversation_id=roles_channel.about, after=page.after)
    assert await roles_channel.of["admin"].call(rest, server.ReportPage) == server.ReportPage(reports=[], after=None)


async def test_system_messages_can_be_deleted_whatever_user_caused_them(scene: Scene) -> None:
    await scene.moderator.call(
        client.SetRole(conversation_id=scene.about, user_id=scene.bystander.ready.user.id, role="moderator")
    )
    await scene.moderator.call(client.UpdateConversation(conversation_id=scene.about, title="Manners"))
    page = await scene.bystander.call(client.History(conversation_id=scene.about), server.MessagePage)
    (told,) = [one for one in page.messages if one.system_message_type == "title_change"]
    await scene.bystander.call(client.Delete(conversation_id=scene.about, message_id=told.id))
    page = await scene.bystander.call(client.History(conversation_id=scene.about), server.MessagePage)
    assert [one.is_deleted for one in page.messages if one.id == told.id] in ([], [True])
