"""Conversations: made, listed, changed."""

import secrets

from msgspec import UNSET

from protocol import client
from protocol.codec import encode
from protocol.errors import ErrorCode, Refused
from protocol.ids import ConversationId, UserId, uuid7
from protocol.limits import MAX_METADATA_BYTES
from protocol.server import ConversationPage, ConversationUpdated, OneConversation
from protocol.values import ConversationView, Json, Role
from server import sync
from server.context import Context
from server.database import Db
from server.errors import NotFound
from server.queries import conversations, users
from server.queries.conversations import Filter, Founding

INVITE_CODE_BYTES = 12
"""Of randomness in an invite code: 96 bits, 16 characters."""


async def create_direct(context: Context, frame: client.CreateDirect) -> OneConversation:
    """Return the caller's conversation with a user, made if there is none."""
    if frame.user_id == context.user_id:
        raise Refused(ErrorCode.INVALID, "A direct conversation is with someone else.", path="user_id")
    founding = Founding(
        id=ConversationId(uuid7()),
        type="direct",
        created_by=context.user_id,
        members={context.user_id: "member", frame.user_id: "member"},
    )
    async with context.database.transaction() as db:
        if not await users.may_write(db, context.user_id, frame.user_id):
            raise NotFound("user_id")
        made = await conversations.create(db, founding)
        if made:
            await users.touch(db, list(founding.members))
        there = await conversations.direct(db, context.user_id, frame.user_id)
        assert there is not None  # noqa: S101 - made above, if not before
        view = await _view(db, context.user_id, there)
    if made:
        context.events.poke(founding.members)
    await sync.join(context, view)
    return OneConversation(view=view)


async def create_group(context: Context, frame: client.CreateGroup) -> OneConversation:
    """Make a group of the caller, who owns it, and those named."""
    members: dict[UserId, Role] = dict.fromkeys(frame.participants, "member")
    return await _create(context, frame, members | {context.user_id: "owner"})


async def create_channel(context: Context, frame: client.CreateChannel) -> OneConversation:
    """Make a channel that the caller owns."""
    return await _create(context, frame, {context.user_id: "owner"})


async def _create(
    context: Context, frame: client.CreateGroup | client.CreateChannel, members: dict[UserId, Role]
) -> OneConversation:
    is_group = isinstance(frame, client.CreateGroup)
    if frame.max_participants is not None and len(members) > frame.max_participants:
        raise Refused(
            ErrorCode.INVALID, "More participants are named than `max_participants` allows.", path="max_participants"
        )
    founding = Founding(
        id=frame.conversation_id,
        type="group" if is_group else "channel",
        created_by=context.user_id,
        members=members,
        title=frame.title,
        description=frame.description,
        is_public=frame.is_public,
        invite_code=None if is_group or frame.is_public else _invite_code(),
        max_participants=frame.max_participants,
        settings=_checked_settings(frame.settings),
    )
    async with context.database.transaction() as db:
        if not await users.are_there(db, list(members)):
            raise NotFound("participants")
        made = await conversations.create(db, founding)
        if made:
            await users.touch(db, list(members))
        elif not await conversations.is_same(db, founding):
            raise Refused(ErrorCode.CONFLICT, "This id is taken by another conversation.", path="conversation_id")
        view = await _view(db, context.user_id, founding.id)
    if made:
        context.events.poke(members)
    await sync.join(context, view)
    return OneConversation(view=view)


async def list_conversations(context: Context, frame: client.ListConversations) -> ConversationPage:
    """Return a page of the caller's conversations."""
    try:
        before = None if frame.after is None else conversations.from_cursor(frame.after)
    except ValueError:
        raise Refused(ErrorCode.INVALID, "This is not an `after` that a page came with.", path="after") from None
    which = Filter(type=frame.conversation_type, is_archived=frame.archived, before=before)
    async with context.database.connection() as db:
        views = await conversations.page(db, context.user_id, which, limit=frame.limit + 1)
    page = views[: frame.limit]
    return ConversationPage(
        conversations=page, after=conversations.cursor(page[-1]) if len(views) > frame.limit else None
    )


async def get(context: Context, frame: client.GetConversation) -> OneConversation:
    """Return one conversation of the caller's."""
    async with context.database.connection() as db:
        return OneConversation(view=await _view(db, context.user_id, frame.conversation_id))


async def update(context: Context, frame: client.UpdateConversation) -> OneConversation:
    """Change a conversation's settings and tell everyone."""
    given = {
        field: getattr(frame, field)
        for field in frame.__struct_fields__
        if field not in {"id", "conversation_id"} and getattr(frame, field) is not UNSET
    }
    if frame.invite_code is not UNSET:
        given["invite_code"] = _invite_code() if frame.invite_code == "new" else None
    if frame.settings is not UNSET:
        _checked_settings(frame.settings)
    async with context.database.transaction() as db:
        await conversations.lock(db, frame.conversation_id)
        before = await _view(db, context.user_id, frame.conversation_id)
        if not before.me.permissions.can_edit_conversation:
            raise Refused(ErrorCode.FORBIDDEN, "Your role cannot change the conversation.")
        if before.conversation.type == "direct":
            raise Refused(ErrorCode.FORBIDDEN, "A direct conversation has no settings to change.")
        if _is_so(before, given):
            return OneConversation(view=before)
        conversation = await conversations.update(db, frame.conversation_id, given)
        view = await _view(db, context.user_id, frame.conversation_id)
    context.events.publish(
        ConversationUpdated(conversation_id=conversation.id, version=conversation.version, conversation=conversation)
    )
    return OneConversation(view=view)


def _is_so(view: ConversationView, given: dict[str, object]) -> bool:
    if "invite_code" in given and (given["invite_code"] is not None or view.invite_code is not None):
        return False
    return all(getattr(view.conversation, field) == value for field, value in given.items() if field != "invite_code")


async def _view(db: Db, user_id: UserId, conversation_id: ConversationId) -> ConversationView:
    views = await conversations.get(db, user_id, [conversation_id])
    if not views:
        raise NotFound("conversation_id")
    return views[0]


def _checked_settings(settings: Json) -> Json:
    if len(encode(settings)) > MAX_METADATA_BYTES:
        raise Refused(ErrorCode.INVALID, f"Settings take at most {MAX_METADATA_BYTES} bytes.", path="settings")
    return settings


def _invite_code() -> str:
    return secrets.token_urlsafe(INVITE_CODE_BYTES)
