"""The frames that read, each with its most expensive input. The cost of a frame that writes is mostly its reads."""

from collections.abc import Callable
from typing import NamedTuple

from benchmarks.worst_database import WORDS, Objects
from protocol import client
from protocol.client import Frame
from protocol.ids import MessageId, uuid7
from protocol.limits import MAX_PAGE, MAX_WATCHED


class Worst(NamedTuple):
    """A frame, the reason of its cost, and its factory."""

    name: str
    about: str
    frame: Callable[[Objects], Frame]


BEGINNINGS = " ".join(word[:3] for word in WORDS.split())
WORST = (
    Worst("get_me", "", lambda _: client.GetMe()),
    Worst("list_conversations", "5,000, each with 100 unread messages",
          lambda _: client.ListConversations(limit=MAX_PAGE)),
    Worst("list_conversations, filtered", "none of 5,000 is hidden",
          lambda _: client.ListConversations(limit=MAX_PAGE, hidden=True)),
    Worst("get_conversation", "100 unread, 5,000 people muted",
          lambda ids: client.GetConversation(conversation_id=ids.conversation)),
    Worst("find_conversations", "50,000 match", lambda _: client.FindConversations(text="eng roo", limit=MAX_PAGE)),
    Worst("list_invitations", "5,000", lambda _: client.ListInvitations()),
    Worst("list_participants", "50,000, from the middle", lambda ids: client.ListParticipants(
        conversation_id=ids.conversation, limit=MAX_PAGE, after=ids.middle)),
    Worst("list_participants, banned", "none of 50,000", lambda ids: client.ListParticipants(
        conversation_id=ids.conversation, limit=MAX_PAGE, status="banned")),
    Worst("set_role", "one of 50,000", lambda ids: client.SetRole(
        conversation_id=ids.conversation, user_id=ids.members.pop(), role="moderator")),
    Worst("remove_participant", "one of 50,000", lambda ids: client.RemoveParticipant(
        conversation_id=ids.conversation, user_id=ids.members.pop())),
    Worst("remove_participant, banned", "one of 50,000", lambda ids: client.RemoveParticipant(
        conversation_id=ids.conversation, user_id=ids.members.pop(), ban=True)),
    Worst("history", "messages of 10,000 characters",
          lambda ids: client.History(conversation_id=ids.conversation, limit=MAX_PAGE, with_replies=True)),
    Worst("history, around", "the middle of 100,000",
          lambda ids: client.History(conversation_id=ids.conversation, limit=MAX_PAGE, around=ids.root)),
    Worst("get_message", "10,000 characters",
          lambda ids: client.GetMessage(conversation_id=ids.conversation, message_id=ids.root)),
    Worst("list_edits", "1,000 of a message",
          lambda ids: client.ListEdits(conversation_id=ids.conversation, message_id=ids.root)),
    Worst("list_pins", "100 of 10,000 characters", lambda ids: client.ListPins(conversation_id=ids.conversation)),
    Worst("list_stars", "10,000", lambda _: client.ListStars(limit=MAX_PAGE)),
    Worst("list_votes", "50,000", lambda ids: client.ListVotes(
        conversation_id=ids.conversation, message_id=ids.poll, limit=MAX_PAGE)),
    Worst("list_readers", "of 50,000",
          lambda ids: client.ListReaders(conversation_id=ids.conversation, message_id=ids.root)),
    Worst("why", "of 50,000", lambda ids: client.Why(conversation_id=ids.conversation, message_id=ids.root)),
    Worst("get_thread", "120 replies, 5,000 people muted",
          lambda ids: client.GetThread(conversation_id=ids.conversation, message_id=ids.root)),
    Worst("list_replies", "120", lambda ids: client.ListReplies(
        conversation_id=ids.conversation, message_id=ids.root, limit=MAX_PAGE)),
    Worst("list_threads", "1,000, each with 100 unread replies", lambda _: client.ListThreads()),
    Worst("list_threads, unread", "as above", lambda _: client.ListThreads(is_unread=True)),
    Worst("list_drafts", "5,000 of 10,000 characters", lambda _: client.ListDrafts()),
    Worst("list_scheduled", "100 of 10,000 characters", lambda _: client.ListScheduled()),
    Worst("list_feed", "100,000 mentions and reactions, 50,000 requests", lambda _: client.ListFeed(limit=MAX_PAGE)),
    Worst("list_feed, mentions", "100,000", lambda _: client.ListFeed(limit=MAX_PAGE, kinds=["mention"])),
    Worst("list_feed, replies", "500 threads", lambda _: client.ListFeed(limit=MAX_PAGE, kinds=["reply"])),
    Worst("list_feed, reactions", "100,000", lambda _: client.ListFeed(limit=MAX_PAGE, kinds=["reaction"])),
    Worst("list_feed, requests", "50,000", lambda _: client.ListFeed(limit=MAX_PAGE, kinds=["friend_request"])),
    Worst("get_badge", "all of this unread", lambda _: client.GetBadge()),
    Worst("list_reports", "50,000", lambda ids: client.ListReports(
        conversation_id=ids.conversation, limit=MAX_PAGE)),
    Worst("get_users", "100 private strangers", lambda ids: client.GetUsers(user_ids=ids.others[:100])),
    Worst("get_users, busy", "100 private strangers in 5,000 other conversations each",
          lambda ids: client.GetUsers(user_ids=ids.busy)),
    Worst("watch", "500 private strangers", lambda ids: client.Watch(user_ids=ids.others[:MAX_WATCHED])),
    Worst("get_profile", "a private stranger", lambda ids: client.GetProfile(user_id=ids.others[0])),
    Worst("search_users", "100,000 private people match, two letters",
          lambda _: client.SearchUsers(text="lo ad", limit=MAX_PAGE)),
    Worst("search_users, busy", "1,000 private people match, in 5,000 other conversations each",
          lambda _: client.SearchUsers(text="char bab", limit=MAX_PAGE)),
    Worst("list_relationships", "50,000 requests of private people",
          lambda _: client.ListRelationships(limit=MAX_PAGE)),
    Worst("list_relationships, filtered", "none", lambda _: client.ListRelationships(limit=MAX_PAGE, kind="block")),
    Worst("resume", "5,000 conversations, all behind", lambda ids: client.Resume(
        epoch="", versions=dict.fromkeys(ids.conversations, 0))),
    Worst("search", "ten prefixes in every message", lambda _: client.Search(text=BEGINNINGS, limit=MAX_PAGE)),
    Worst("search, ranked", "as above",
          lambda _: client.Search(text=BEGINNINGS, limit=MAX_PAGE, order="relevance")),
    Worst("search, filtered", "nothing has a file", lambda _: client.Search(text="eng", has_file=True)),
    Worst("search, mentions", "100,000", lambda _: client.Search(mentions_me=True, limit=MAX_PAGE)),
    Worst("read", "counts 100", lambda ids: client.Read(conversation_id=ids.conversation, message_id=ids.root)),
    Worst("send", "to 50,000", lambda ids: client.Send(
        conversation_id=ids.conversation, message_id=MessageId(uuid7()), content="Hello @everyone")),
    Worst("typing", "", lambda ids: client.Typing(conversation_id=ids.conversation)),
)  # fmt: skip
