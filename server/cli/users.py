"""`openchat user` and `openchat erase`: accounts, and all data of a user."""

import contextlib
import secrets
from collections.abc import AsyncIterator, Mapping
from functools import partial
from typing import Any

import asyncpg
import click
import msgspec

from protocol import limits
from protocol.codec import advice
from protocol.http import canonical
from protocol.ids import UserId
from server.app.command_news import CommandNews
from server.auth import passwords
from server.cli import admin
from server.cli.admin import Answer, ListPart, RightsChange, command, with_limit, with_yes
from server.cli.arguments import Command, Group, with_data_dir, with_json
from server.context import Events
from server.core.errors import Fatal
from server.db import database
from server.db.database import Db
from server.domain import erasure as erasing
from server.domain.export import written
from server.domain.publish import publish_participant
from server.queries import accounts, erasure, participants, sessions, users

PASSWORD_BYTES = 12
"""Random bytes of a generated password."""

with_user = click.argument("user", help="An e-mail address or an id.")


@click.group(
    "user",
    cls=Group,
    examples="""
        openchat user create Ada ada@example.org --admin
        openchat user list ada
        openchat user disable ada@example.org
    """,
)
def user() -> None:
    """List, create, change and disable accounts.

    These commands are recorded in the server's audit log. They take effect immediately, even on a running server.
    """


@command(
    user, "create", click.argument("name", help="What others see."), click.argument("email", help="To log in with."),
    click.option("--admin", "is_admin", is_flag=True, help="Make the user a server administrator."),
    example="Ada ada@example.org --admin",
)  # fmt: skip
async def create_user(db: Db, *, name: str, email: str, is_admin: bool) -> Answer:
    """Create an account, and print its password once."""
    _require_fit("an e-mail address", email, limits.Email)
    _require_fit("a name", name, limits.Name)
    password = secrets.token_urlsafe(PASSWORD_BYTES)
    password_hash = await passwords.hashed(password)
    try:
        async with db.transaction():
            user_id = await accounts.register(db, name, canonical(email), password_hash)
            if is_admin:
                await accounts.promote(db, user_id, is_admin=True)
            await admin.note(db, "create_user", user_id, is_admin=is_admin)
    except asyncpg.UniqueViolationError:
        raise Fatal("this e-mail address has an account already.") from None
    return {"id": str(user_id), "email": canonical(email), "password": password}


def _require_fit(what: str, value: str, kind: object) -> None:
    """Raise Fatal, with the expected form, for a value that the protocol does not allow."""
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise Fatal(f"`{value}` cannot be {what}. {advice(str(error))}") from None


@command(
    user, "list", click.argument("text", default="", help="A part of a name or of an e-mail address."), with_limit,
    click.option("--after", default="", metavar="EMAIL", help="Continue after the last one shown."),
    example="ada --limit 10",
)  # fmt: skip
async def list_users(db: Db, *, text: str, limit: int, after: str) -> Answer:
    """List accounts, by e-mail address.

    With TEXT, only those with the text in a name or in the address.
    """
    found = await accounts.listed(db, text, after, limit=limit)
    await admin.note(db, "list_users")
    page = await found.decoded()
    return ListPart([admin.fields(entry) for entry in page.rows], page.after)


@command(user, "show", with_user, example="ada@example.org")
async def show_user(db: Db, *, user: str) -> Answer:
    """Show an account."""
    card = await admin.card(db, user)
    await admin.note(db, "show_user", card.id)
    return admin.fields(card)


@command(user, "disable", with_user, example="ada@example.org")
async def disable_user(db: Db, *, user: str) -> RightsChange:
    """Disable an account until it is enabled again."""
    return await _set_disabled(db, user, is_disabled=True)


@command(user, "enable", with_user, example="ada@example.org")
async def enable_user(db: Db, *, user: str) -> RightsChange:
    """Enable a disabled account."""
    return await _set_disabled(db, user, is_disabled=False)


@command(user, "promote", with_user, example="ada@example.org")
async def promote_user(db: Db, *, user: str) -> RightsChange:
    """Make a user a server administrator."""
    return await _set_admin(db, user, is_admin=True)


@command(user, "demote", with_user, example="ada@example.org")
async def demote_user(db: Db, *, user: str) -> RightsChange:
    """Make a server administrator an ordinary user."""
    return await _set_admin(db, user, is_admin=False)


@command(user, "reset-password", with_user, example="ada@example.org")
async def reset_password(db: Db, *, user: str) -> RightsChange:
    """Set a new password, print it once, and end all sessions."""
    card = await admin.card(db, user)
    password = secrets.token_urlsafe(PASSWORD_BYTES)
    new_hash = await passwords.hashed(password)
    async with db.transaction():
        await users.lock(db, [card.id])
        if not await accounts.give_password(db, card.id, new_hash):
            raise Fatal(f"{card.email} cannot log in: it is erased, or another account logs in with this address.")
        await sessions.revoke(db, card.id, None)
        await users.touch(db, [card.id])
        await admin.note(db, "reset_password", card.id)
    answer = {"id": str(card.id), "email": card.email, "password": password}
    return RightsChange(answer, CommandNews(partial(_of_user, card.id), account=card.email))


@command(
    user, "sessions", with_user, click.option("--revoke", "is_revoked", is_flag=True, help="End all of them."),
    example="ada@example.org --revoke",
)  # fmt: skip
async def list_sessions(db: Db, *, user: str, is_revoked: bool) -> Answer | RightsChange:
    """List a user's sessions, or end them."""
    card = await admin.card(db, user)
    if is_revoked:
        async with db.transaction():
            await users.lock(db, [card.id])
            found = await sessions.of_user(db, card.id, None)
            ended: list[Mapping[str, Any]] = [admin.fields(one) | {"state": "ended"} for one in found]
            await sessions.revoke(db, card.id, None)
            await users.touch(db, [card.id])
            await admin.note(db, "revoke_sessions", card.id)
        return RightsChange(ended, CommandNews(partial(_of_user, card.id)))
    await admin.note(db, "list_sessions", card.id)
    return [admin.fields(one) for one in await sessions.of_user(db, card.id, None)]


async def _set_disabled(db: Db, user: str, *, is_disabled: bool) -> RightsChange:
    card = await admin.card(db, user)
    async with db.transaction():
        await users.lock(db, [card.id])
        await accounts.disable(db, card.id, is_disabled=is_disabled)
        if is_disabled:
            await sessions.revoke(db, card.id, None)
        await admin.note(db, "disable_user" if is_disabled else "enable_user", card.id)
    return RightsChange(admin.fields(await admin.card(db, user)), CommandNews(partial(_of_user, card.id)))


async def _set_admin(db: Db, user: str, *, is_admin: bool) -> RightsChange:
    card = await admin.card(db, user)
    async with db.transaction():
        await accounts.promote(db, card.id, is_admin=is_admin)
        await admin.note(db, "promote_user" if is_admin else "demote_user", card.id)
    return RightsChange(admin.fields(await admin.card(db, user)), CommandNews(partial(_of_user, card.id)))


def _of_user(user_id: UserId, events: Events) -> None:
    """Make the workers recheck a user's sessions, and who may see the user."""
    events.notify([user_id])
    events.reconsider(user_id)


async def export_user(db: Db, who: str) -> AsyncIterator[bytes]:
    """Yield all stored data of a user as JSON (protocol/export.py), in pieces. This is recorded in the audit log."""
    card = await admin.card(db, who)
    await admin.note(db, "export_user", card.id)
    async for piece in written(lambda: contextlib.nullcontext(db), card.id):
        yield piece


@click.command("erase", cls=Command, examples="openchat erase ada@example.org --yes --verify")
@with_user
@with_yes
@click.option("--verify", "is_verified", is_flag=True, help="Search for remaining data afterwards.")
@with_json
@with_data_dir
def erase(user: str, data_dir: str | None, *, is_meant: bool, is_verified: bool, is_json: bool) -> None:
    """Erase a user. Their messages stay, without a name.

    All other data of the user is deleted. For 90 days, ended relationships keep the ids of both users.
    """
    # Changes that a failed attempt has committed are published, too.
    work = partial(erase_user, user=user, is_meant=is_meant, is_verified=is_verified, changes=[])
    admin.start(work, is_json=is_json, data_dir=data_dir)


async def erase_user(
    db: Db, *, user: str, is_meant: bool, is_verified: bool, changes: list[participants.ParticipantChange]
) -> RightsChange:
    """Erase a user now. `changes` collects the ends of the user's memberships."""
    card = await admin.card(db, user)
    texts = [] if card.state == "erased" else await erasure.words(db, card.id)
    if card.state != "erased" and not is_meant:
        await admin.note(db, "show_user", card.id)
        raise Fatal(f"this erases {card.name} ({card.email}). It cannot be undone. To confirm, use --yes.")
    if is_meant:
        # An erased user is erased again, because data may remain or may have been added since.
        await erasing.erase(database.Single(db), card.id, changes.append)
        await admin.note(db, "erase_user", card.id)
    answer: dict[str, Any] = {"id": str(card.id), "state": "erased"}
    failure = None
    if is_verified:
        found = await erasure.traces(db, card.id, texts)
        left = [f"{trace.place} ({trace.found})" for trace in found if not trace.is_said]
        if left:
            failure = f"data of the user remains in {', '.join(left)}."
        answer["traces"] = 0
        answer["people_say_the_same_in"] = ", ".join(f"{trace.place} ({trace.found})" for trace in found) or "-"

    def news(events: Events) -> None:
        for change in changes:
            publish_participant(events, change)
        _of_user(card.id, events)

    return RightsChange(answer, CommandNews(news), failure)
