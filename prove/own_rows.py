"""The own rows of a user in events and replies, and their numbers.

An own row is known by its table and its key. Each event about it, and each reply with it, carries its `user_version`.
"""

from collections.abc import Callable, Iterator
from typing import Any
from uuid import UUID

import msgspec

from protocol import server
from protocol.server import OwnEvent
from protocol.values import ConversationView, Draft, Invitation, Me, Relationship, Scheduled, ThreadFollow

Row = tuple[str, UUID | None]
"""The table and the key of an own row."""

_ROWS: dict[type[OwnEvent], Callable[[Any], Row]] = {
    server.MeChanged: lambda _: ("me", None),
    server.RelationshipChanged: lambda event: ("relationship", event.relationship.id),
    # An invitation and the preferences of the same conversation are one row.
    server.Invited: lambda event: ("participation", event.invitation.conversation_id),
    server.InvitationEnded: lambda event: ("participation", event.conversation_id),
    server.PreferencesChanged: lambda event: ("participation", event.conversation_id),
    server.StarChanged: lambda event: ("star", event.star.message_id),
    server.DraftChanged: lambda event: ("draft", event.draft.conversation_id),
    server.ScheduledChanged: lambda event: ("scheduled", event.scheduled.message_id),
    server.ThreadFollowChanged: lambda event: ("follow", event.follow.root_id),
}
_EVENTS: dict[type[msgspec.Struct], Callable[[Any], OwnEvent]] = {
    Me: lambda me: server.MeChanged(user_version=me.user_version, me=me),
    Relationship: lambda one: server.RelationshipChanged(user_version=one.user_version, relationship=one),
    Invitation: lambda one: server.Invited(user_version=one.user_version, invitation=one),
    ConversationView: lambda view: server.PreferencesChanged(
        user_version=view.preferences.user_version,
        conversation_id=view.conversation.id,
        preferences=view.preferences,
    ),
    Draft: lambda draft: server.DraftChanged(user_version=draft.user_version, draft=draft),
    Scheduled: lambda one: server.ScheduledChanged(user_version=one.user_version, scheduled=one),
    ThreadFollow: lambda follow: server.ThreadFollowChanged(user_version=follow.user_version, follow=follow),
}
"""The event with the same content as a value."""


def row_of(event: OwnEvent) -> Row:
    """Return the own row that an event is about. `own_start_over` is about all of them."""
    return _ROWS[type(event)](event)


def rows_in(value: object) -> Iterator[OwnEvent]:
    """Yield the own rows in a reply or a view, as events with the same content. Stars in a list are not included,
    because the list has their messages.
    """
    if make := _EVENTS.get(type(value)):  # type: ignore[arg-type]
        yield make(value)
    elif isinstance(value, list):
        for one in value:
            yield from rows_in(one)
    elif isinstance(value, msgspec.Struct):
        for name in value.__struct_fields__:
            yield from rows_in(getattr(value, name))
