"""Conversations: create, list, get, update, delete, find, and the caller's preferences."""

import msgspec

from protocol import client
from protocol.errors import ErrorCode, Refused
from protocol.ids import EVERYONE, ConversationId, UserId, uuid7
from protocol.roles import Act
from protocol.server import (
    ConversationPage,
    Done,
    OneConversation,
    PublicConversationList,
)
from protocol.values import Conversation, ConversationView, Role
from server.context import Context
from server.core.errors import NotActive, NotFound
from server.db.database import Db
from server.domain import search_text, sync
from server.domain.invite_code import new_code
from server.domain.membership import (
    MembershipChange,
    Welcome,
    counted,
    end,
    guests,
    lock_with_member,
    require_uncounted,
    welcomed,
)
from server.domain.permissions import require, unreachable
from server.domain.publish import publish_updated
from server.queries import audit, bounds, conversation_views, conversations, creation, participants, users
from server.queries.audit import Deed
from server.queries.conversation_views import Filter
from server.queries.creation import Founding
from server.queries.cursor import Cursor
from server.queries.system_messages import SystemMessage


async def create_direct(context: Context, frame: client.CreateDirect) -> OneConversation:
    """Return the caller's direct conversation with a user. Create it if there is none."""
    if frame.user_id == context.user_id:
        raise Refused(ErrorCode.INVALID, "`user_id` must name another user.", path="user_id")
    founding = Founding(
        id=ConversationId(uuid7()),
        type="direct",
        created_by=context.user_id,
        members={context.user_id: "member", frame.user_id: "member"},
    )
    async with context.transaction() as db:
        there = await creation.direct(db, context.user_id, frame.user_id)
        if there is not None and await conversations.is_deleted(db, there):
            raise Refused(
                ErrorCode.CONFLICT,
                "The operator deleted your direct conversation, and each pair has only one. Make a group instead.",
                path="user_id",
            )
        made = False
        if there is None:
            # Checked before the lock, too, so that a refused frame locks no stranger.
            if not await users.all_may(db, "write", context.user_id, [frame.user_id]):
                raise await unreachable(db, context.user_id, frame.user_id)
            await bounds.require_made(db, context.user_id, "user_id", more=1)
            if context.user_id not in await users.lock(db, founding.members):
                raise NotActive
            if not await users.all_may(db, "write", context.user_id, [frame.user_id]):
                raise await unreachable(db, context.user_id, frame.user_id)
            made = await creation.create(db, founding)
            if made:
                await users.touch(db, list(founding.members))
                await bounds.require_made(db, context.user_id, "user_id")
                await bounds.require_memberships(db, list(founding.members), "user_id")
            there = await creation.direct(db, context.user_id, frame.user_id)
        assert there is not None  # noqa: S101 - made above, if not before
        view = await _view(db, context.user_id, there)
    if made:
        context.events.notify(founding.members, may_watch_others=True)
    await sync.join(context, view)
    return OneConversation(view=view)


async def create_group(context: Context, frame: client.CreateGroup) -> OneConversation:
    """Create a group of the caller, who owns it, and the named users."""
    members: dict[UserId, Role] = dict.fromkeys(frame.participants, "member")
    return await _create(context, frame, members | {context.user_id: "owner"})


async def create_channel(context: Context, frame: client.CreateChannel) -> OneConversation:
    """Create a channel that the caller owns."""
    return await _create(context, frame, {context.user_id: "owner"})


async def _create(
    context: Context, frame: client.CreateGroup | client.CreateChannel, members: dict[UserId, Role]
) -> OneConversation:
    is_group = isinstance(frame, client.CreateGroup)
    if frame.max_participants is not None and len(members) > frame.max_participants:
        raise Refused(
            ErrorCode.INVALID,
            "`max_participants` must be at least the number of participants.",
            path="max_participants",
        )
    founding = Founding(
        id=frame.conversation_id,
        type="group" if is_group else "channel",
        created_by=context.user_id,
        members=members,
        title=frame.title,
        description=frame.description,
        image=frame.image,
        is_public=frame.is_public,
        invite_code=None if is_group or frame.is_public else new_code(),
        max_participants=frame.max_participants,
        settings=frame.settings,
    )
    async with context.transaction() as db:
        they = await _made(db, context, founding)
        made = they is not None
        if not made and not await creation.is_same(db, founding):
            raise Refused(
                ErrorCode.CONFLICT, "Another conversation has this id. Make a new id.", path="conversation_id"
            )
        view = await _view(db, context.user_id, founding.id)
        if they is None:
            they = await _there(db, context, founding)
    if made:
        # Participants see each other from now on, even private ones.
        context.events.notify([context.user_id, *they.added], may_watch_others=bool(they.added))
        context.events.notify(they.invited)
    await sync.join(context, view)
    return OneConversation(view=view, added=they.present + they.added, invited=they.waiting + they.invited)


async def _made(db: Db, context: Context, founding: Founding) -> Welcome | None:
    """Create a group or channel. Return how its participants come in, or None if the id is taken.

    The id may belong to a conversation of others, so nothing in that is read and no refusal depends on it.
    """
    if await conversations.versions(db, [founding.id]):
        return None
    is_group = founding.type == "group"
    if is_group:
        # A refused frame locks no strangers.
        await bounds.require_made(db, context.user_id, "conversation_id", more=1)
        await require_uncounted(db, context, welcomed(context, await guests(db, context, None, founding.members)))
    if context.user_id not in await users.lock(db, founding.members):
        raise NotActive
    if await conversations.versions(db, [founding.id]):
        return None  # the same frame on another connection created it while this one waited
    they = welcomed(context, await guests(db, context, None, founding.members) if is_group else [])
    founding = msgspec.structs.replace(founding, invited=frozenset(they.invited))
    if not await creation.create(db, founding):
        return None
    await counted(db, context, they)
    await participants.stamp(db, founding.id, they.invited, also=list(founding.members))
    await bounds.require_made(db, context.user_id, "conversation_id")
    entering = [one for one in founding.members if one not in founding.invited]
    await bounds.require_memberships(db, entering, "participants" if is_group else "conversation_id")
    return they


async def _there(db: Db, context: Context, founding: Founding) -> Welcome:
    """Return the result of a repeated `create_group`: those of the named users who participate or are invited, as far
    as the caller sees that.
    """
    named = [one for one in founding.members if one != context.user_id]
    seen = await participants.seen(db, founding.id, context.user_id, named) if named else {}
    present, waiting = ([one for one in named if seen.get(one) == status] for status in ("active", "invited"))
    return Welcome(present, waiting, [], [])


async def list_conversations(context: Context, frame: client.ListConversations) -> ConversationPage:
    """Return a page of the caller's conversations."""
    before = Cursor.read(frame.after)
    which = Filter(type=frame.conversation_type, is_archived=frame.archived, is_hidden=frame.hidden, before=before)
    async with context.database.connection() as db:
        found = await conversation_views.page(db, context.user_id, which, limit=frame.limit)
    page = await found.decoded()
    return ConversationPage(conversations=page.rows, after=page.after)


async def get(context: Context, frame: client.GetConversation) -> OneConversation:
    """Return one of the caller's conversations."""
    async with context.database.connection() as db:
        return OneConversation(view=await _view(db, context.user_id, frame.conversation_id))


async def update(context: Context, frame: client.UpdateConversation) -> OneConversation:
    """Change a conversation's settings, and publish the change."""
    given = client.given(frame)
    async with context.transaction() as db:
        if await conversations.lock_as(db, frame.conversation_id, context.user_id) is None:
            raise NotFound("conversation_id")
        before = await _view(db, context.user_id, frame.conversation_id)
        if before.conversation.type == "direct":
            raise Refused(
                ErrorCode.FORBIDDEN,
                "A direct conversation has no settings. Change your own with `set_preferences`.",
                path="conversation_id",
            )
        require(before.me, Act.EDIT_CONVERSATION)
        changed = {field: value for field, value in given.items() if getattr(before.conversation, field) != value}
        if not changed:
            return OneConversation(view=before)
        conversation = await conversations.update(db, frame.conversation_id, changed)
        membership_change = MembershipChange(context, db, conversation)
        for said in _said(conversation, changed):
            await membership_change.post_system_message(said)
        await membership_change.record(
            Deed(context.user_id, "update_conversation", details={"fields": sorted(changed)})
        )
        view = await _view(db, context.user_id, frame.conversation_id)
    publish_updated(context.events, conversation)
    membership_change.tell()
    return OneConversation(view=view)


def _said(conversation: Conversation, changed: dict[str, object]) -> list[SystemMessage]:
    """Return the system messages about a change."""
    said: list[SystemMessage] = []
    if "title" in changed:
        words = f"changed the title to {conversation.title}"
        said.append(SystemMessage("title_change", words, {"title": conversation.title}))
    if fields := sorted(changed.keys() - {"title"}):
        words = f"changed {', '.join(field.removeprefix('is_') for field in fields)}"
        said.append(SystemMessage("settings_change", words, {"fields": fields}))
    return said


async def delete(context: Context, frame: client.DeleteConversation) -> Done:
    """Delete a conversation for everyone."""
    async with context.transaction() as db:
        conversation, me = await lock_with_member(db, context, frame.conversation_id)
        require(me, Act.DELETE_CONVERSATION)
        conversation = await end(db, conversation.id)
        await audit.record(db, conversation.id, Deed(context.user_id, "delete_conversation"))
    publish_updated(context.events, conversation, gone=EVERYONE)
    return Done()


async def find(context: Context, frame: client.FindConversations) -> PublicConversationList:
    """Return public conversations whose title or description contains the words."""
    query = search_text.query(frame.text, prefix=search_text.PREFIX_OF_NAMES)
    async with context.database.searching() as db:
        return PublicConversationList(conversations=await conversations.find(db, query, limit=frame.limit))


async def set_preferences(context: Context, frame: client.SetPreferences) -> OneConversation:
    """Change the caller's own preferences for a conversation."""
    given = client.given(frame)
    async with context.transaction() as db:
        event = await participants.prefer(db, frame.conversation_id, context.user_id, given) if given else None
        if given and event is None:
            raise NotFound("conversation_id")
        view = await _view(db, context.user_id, frame.conversation_id)
    if event is not None:
        context.events.tell_own(context.user_id, event)
    return OneConversation(view=view)


async def _view(db: Db, user_id: UserId, conversation_id: ConversationId) -> ConversationView:
    views = await conversation_views.get(db, user_id, [conversation_id])
    if not views:
        raise NotFound("conversation_id")
    return views[0]
