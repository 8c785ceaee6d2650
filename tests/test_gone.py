"""Conversations that were deleted, or that the user left or was removed from, have no counts and notifications."""

from typing import Any

from protocol import client, server
from protocol.ids import ConversationId, MessageId
from prove.client import Client
from server.queries import push
from tests.world import UserSession, World, sent

SUBSCRIBE = """
INSERT INTO push_endpoint (user_id, session_id, endpoint, p256dh, auth)
SELECT user_id, id, 'https://push.example.org/' || id, '', '' FROM session
"""


async def count_results(world: World, one: Client, me: UserSession, message_id: MessageId) -> dict[str, int]:
    """Return the number of results of each frame about all conversations of a user, and of notifications."""
    await world.indexed()
    lists: dict[str, tuple[client.Frame, type[Any], str]] = {
        "search": (client.Search(text="engine"), server.SearchPage, "hits"),
        "search, mentions": (client.Search(mentions_me=True), server.SearchPage, "hits"),
        "threads": (client.ListThreads(), server.ThreadList, "threads"),
        "unread threads": (client.ListThreads(is_unread=True), server.ThreadList, "threads"),
        "stars": (client.ListStars(), server.MessageList, "messages"),
        "drafts": (client.ListDrafts(), server.DraftList, "drafts"),
        "conversations": (client.ListConversations(), server.ConversationPage, "conversations"),
    }
    counts = {name: len(getattr(await one.call(frame, kind), field)) for name, (frame, kind, field) in lists.items()}
    page = await one.call(client.ListFeed(), server.FeedPage)
    for kind in ("mention", "reply", "reaction"):
        counts[f"feed, {kind}"] = sum(entry.kind == kind for entry in page.entries)
    badge = await one.call(client.GetBadge(), server.Badge)
    counts |= {"feed, unread": page.unread_count, "badge": badge.messages, "badge, feed": badge.feed}
    here = await world.db.fetchval("SELECT conversation_id FROM message WHERE id = $1", message_id)
    found = await push.due(world.db, [push.PushPage(here, push.FIRST, (message_id,))], 100)
    return counts | {"pushed": sum(post.user_id == me.id for post in found.posts)}


async def count_invitations(one: Client) -> dict[str, int]:
    """Return the number of results of each frame about the invitations of a user."""
    page = await one.call(client.ListFeed(), server.FeedPage)
    waiting = await one.call(client.ListInvitations(), server.InvitationList)
    badge = await one.call(client.GetBadge(), server.Badge)
    return {"feed": len(page.entries), "invitations": len(waiting.invitations), "badge": badge.feed}


async def test_ended_conversations_have_no_counts_and_no_notifications(world: World) -> None:
    people = await world.users("Ada", "Charles", "Grace")
    ada, charles, grace = [await world.connect(who) for who in people]
    me = people[1].id
    await world.db.execute(SUBSCRIBE)

    async def filled() -> tuple[ConversationId, MessageId]:
        there = await world.group(ada, people[1])
        await ada.call(client.Invite(conversation_id=there, participants=[people[2].id]))
        mine = await sent(charles, there, "An engine")
        await sent(ada, there, "A reply", parent_message_id=mine)
        await ada.call(client.React(conversation_id=there, message_id=mine, emoji="👍"))
        await sent(ada, there, "To @everyone")
        last = await sent(ada, there, "To @charles")
        await charles.call(client.Star(conversation_id=there, message_id=last))
        await charles.call(client.SetDraft(conversation_id=there, content="I thi"))
        return there, last

    for way in (
        lambda there: (charles, client.Leave(conversation_id=there)),
        lambda there: (ada, client.RemoveParticipant(conversation_id=there, user_id=me)),
        lambda there: (ada, client.RemoveParticipant(conversation_id=there, user_id=me, ban=True)),
        lambda there: (ada, client.DeleteConversation(conversation_id=there)),
    ):
        there, last = await filled()
        before = await count_results(world, charles, people[1], last)
        assert min(before.values()) > 0, before
        assert min((await count_invitations(grace)).values()) > 0
        actor, frame = way(there)
        await actor.call(frame)
        after = await count_results(world, charles, people[1], last)
        assert after == dict.fromkeys(after, 0), frame
        if not isinstance(frame, client.DeleteConversation):
            await ada.call(client.DeleteConversation(conversation_id=there))
        invited = await count_invitations(grace)
        assert invited == dict.fromkeys(invited, 0)
