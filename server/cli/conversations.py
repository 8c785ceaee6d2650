"""`openchat conversation`: conversations, their messages, and their audit logs."""

from collections.abc import Mapping
from typing import Any
from uuid import UUID

import click
import msgspec

from protocol.ids import EVERYONE, ConversationId
from server.app.command_news import CommandNews
from server.cli import admin
from server.cli.admin import Answer, ListPart, RightsChange, command, with_limit, with_yes
from server.cli.arguments import SOME_ID, Group, Id
from server.context import Events
from server.core.errors import Fatal
from server.core.terminal import say_json
from server.db.database import Db
from server.domain import membership
from server.domain.publish import publish_updated
from server.ops.progress import Progress
from server.queries import audit, conversation_cards, conversations, export

ENTRIES_PER_QUERY = 500
"""Max entries of an audit log that one query reads."""
LAST_ID = UUID(int=2**128 - 1)
SERVER_LOG = UUID(int=0)
"""The id that stands for the server's own audit log."""

with_conversation = click.argument("conversation", type=Id(), help="An id.")


@click.group(
    "conversation",
    cls=Group,
    examples=f"""
        openchat conversation list engines
        openchat conversation list --user ada@example.org
        openchat conversation show {SOME_ID}
    """,
)
def conversation() -> None:
    """List, show, export and delete conversations.

    These commands are recorded in the server's audit log. They take effect immediately, even on a running server.
    """


@command(
    conversation, "list", click.argument("text", default="", help="A part of a title."), with_limit,
    click.option("--user", metavar="USER", help="Only those of a user: an e-mail address or an id."),
    click.option("--after", type=Id(), default=LAST_ID, metavar="ID", help="Continue after the last one shown."),
    example="--user ada@example.org",
)  # fmt: skip
async def list_conversations(db: Db, *, text: str, limit: int, user: str | None, after: UUID) -> Answer:
    """List conversations, newest first.

    With TEXT, only those with the text in their title. With --user, only those of a user.
    """
    user_id = None if user is None else (await admin.card(db, user)).id
    found = await conversation_cards.listed(db, text, ConversationId(after), user_id=user_id, limit=limit)
    await admin.note(db, "list_conversations", user_id)
    page = await found.decoded()
    return ListPart([admin.fields(entry) for entry in page.rows], None if page.after is None else str(page.after))


@command(conversation, "show", with_conversation, example=SOME_ID)
async def show_conversation(db: Db, *, conversation: UUID) -> Answer:
    """Show a conversation, without its messages."""
    found = await _conversation(db, conversation)
    await admin.note(db, "show_conversation", None, conversation_id=str(found.conversation.id))
    return _shown(found)


def _shown(found: conversation_cards.ConversationCard) -> Answer:
    rest = {
        "owner": str(found.owner),
        "messages": found.message_count,
        "last_activity_at": msgspec.to_builtins(found.last_activity_at),
    }
    return admin.fields(found.conversation) | rest


@command(conversation, "export", with_conversation, example=SOME_ID)
async def export_conversation(db: Db, *, conversation: UUID) -> Answer:
    """Print all messages of a conversation as lines of JSON."""
    found = await _conversation(db, conversation)
    await admin.note(db, "export_conversation", None, conversation_id=str(found.conversation.id))
    progress, after = Progress(), 0
    while lines := await conversation_cards.everything(db, found.conversation.id, after, limit=export.ROWS_PER_PAGE):
        for line, _ in lines:
            say_json(line + "\n")
        after = lines[-1][1]
        progress.counts("versions", after)
    progress.done()
    return None


@command(conversation, "delete", with_conversation, with_yes, example=f"{SOME_ID} --yes")
async def delete_conversation(db: Db, *, conversation: UUID, is_meant: bool) -> Answer | RightsChange:
    """Delete a group or a channel for everyone. This cannot be undone."""
    found = (await _conversation(db, conversation)).conversation
    if membership.is_lasting(found):
        raise Fatal(
            "a direct conversation cannot be deleted, because its two participants could never have another one."
        )
    if not found.is_deleted and not is_meant:
        await admin.note(db, "show_conversation", None, conversation_id=str(found.id))
        raise Fatal(
            f"this deletes the {found.type} `{found.title}` ({found.id}) and its {found.participant_count} "
            "participants lose it. This cannot be undone. To confirm, use --yes."
        )
    answer = {"id": str(found.id), "title": found.title, "state": "deleted"}
    async with db.transaction():
        if await conversations.lock(db, found.id) is None:
            return answer
        ended = await membership.end(db, found.id)
        await admin.note(db, "delete_conversation", None, conversation_id=str(found.id))

    def news(events: Events) -> None:
        publish_updated(events, ended, gone=EVERYONE)

    return RightsChange(answer, CommandNews(news))


@command(
    conversation, "audit", with_conversation,
    click.option("--verify", "is_verified", is_flag=True, help="Only verify that no entry was changed."),
    example=f"{SERVER_LOG} --verify",
)  # fmt: skip
async def show_audit(db: Db, *, conversation: UUID, is_verified: bool) -> Answer:
    """Show the audit log of a conversation.

    The id 00000000-0000-0000-0000-000000000000 selects the server's own log.
    """
    chain = ConversationId(conversation)
    if (number := await audit.broken(db, chain)) is not None:
        raise Fatal(f"the log was tampered with at or before entry {number}.")
    if is_verified:
        return {"entries": await audit.count(db, chain), "tampered_with": False}
    entries: list[Mapping[str, Any]] = []
    after: int | None = 0
    while after is not None:
        page = await (await audit.page(db, chain, after, limit=ENTRIES_PER_QUERY)).decoded()
        entries += [admin.fields(entry) for entry in page.rows]
        after = page.after
    return entries


async def _conversation(db: Db, conversation: UUID) -> conversation_cards.ConversationCard:
    found = await conversation_cards.card(db, ConversationId(conversation))
    if found is None:
        raise Fatal(f"the conversation {conversation} does not exist.")
    return found
