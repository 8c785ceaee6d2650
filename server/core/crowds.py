"""The crowd rule: which changes of a large conversation are delivered, because each of them reaches very many users.

Of the changes of one participant, of one poll, or of one emoji on a message, the latest has the current state. So a
client that applies only that one has the current state, too.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Self, TypeAlias

import msgspec

from protocol.ids import UserId

CROWD_SECONDS = 1.0
"""Min interval between deliveries to a crowd, in seconds: of gathered changes, or of a user's presence and face."""
SAMPLED_PARTICIPANTS = 10
"""Max participants whose changes everyone receives, per `changes` event: those that changed last."""

Subject: TypeAlias = tuple[str, ...]

_PARTICIPANT = "participant"


class _Whose(msgspec.Struct):
    user_id: UserId


class _Fields(msgspec.Struct):
    """The fields of all kinds of events that the rule reads."""

    type: str
    version: int = 0
    message_id: str = ""
    emoji: str = ""
    user_id: UserId | None = None
    participant: _Whose | None = None


_decoder = msgspec.json.Decoder(_Fields)


class Change(NamedTuple):
    """A durable event, as far as the rule reads it. `subject` is the object whose later changes replace this one, or
    None if everyone receives each change. `user_id` is the user who made the change, or the participant that changed.
    """

    version: int
    subject: Subject | None
    user_id: UserId | None

    @classmethod
    def of(cls, event: bytes) -> Self:
        """Read an event, which is JSON. Events that this release does not know have no subject."""
        fields = _decoder.decode(event)
        subject: Subject | None = None
        user_id = fields.user_id
        match fields.type:
            case "message_reacted" | "message_unreacted":
                subject = "reaction", fields.message_id, fields.emoji
            case "poll_voted" | "message_changed":
                subject = fields.type, fields.message_id
            case "outsiders_changed":
                subject = (fields.type,)
            case "participant_changed" | "participant_left":
                user_id = user_id if fields.participant is None else fields.participant.user_id
                subject = _PARTICIPANT, str(user_id)
        return cls(fields.version, subject, user_id)


class Delivered(NamedTuple):
    """The changes that a user receives, by their places, and whether participants are left out."""

    places: list[int]
    is_partial: bool


class Crowd:
    """Changes of a large conversation, in the order of their versions."""

    __slots__ = ("_is_partial", "_of_everyone", "_own")

    def __init__(self, changes: Sequence[Change]) -> None:
        latest: dict[Subject, int] = {}
        every: list[int] = []
        own: dict[UserId, list[int]] = {}
        for place, change in enumerate(changes):
            if change.subject is None:
                every.append(place)
            else:
                latest[change.subject] = place
                if change.user_id is not None:
                    own.setdefault(change.user_id, []).append(place)
        participants = sorted(place for subject, place in latest.items() if subject[0] == _PARTICIPANT)
        left_out = set(participants[:-SAMPLED_PARTICIPANTS])
        self._is_partial = bool(left_out)
        of_everyone = {*every, *(place for place in latest.values() if place not in left_out)}
        self._of_everyone = sorted(of_everyone)
        # Thousands of users may react to different messages. Each of their changes reaches everyone.
        self._own = {user_id: places for user_id, places in own.items() if not of_everyone.issuperset(places)}

    def has_own(self, user_id: UserId) -> bool:
        """Whether a user receives changes that others do not: own ones that were replaced or left out."""
        return user_id in self._own

    def delivered(self, user_id: UserId | None = None) -> Delivered:
        """Return what a user receives: what everyone does, and all of the user's own changes. With None, return what
        everyone receives.
        """
        own: Iterable[int] = () if user_id is None else self._own.get(user_id, ())
        places = sorted({*self._of_everyone, *own}) if own else self._of_everyone
        return Delivered(places, self._is_partial)
