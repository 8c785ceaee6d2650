"""Another device of a simulated user."""

import copy
from collections import Counter

from protocol import client
from protocol.client import Frame
from prove.actor import Actor


class Device(Actor):
    """A further device of an actor's account. It leaves the user's presence to the actor.

    It begins with a copy of the actor's mirror. Reading every conversation again would use up the user's rate limits.
    """

    @classmethod
    def of(cls, actor: Actor, seed: int) -> "Device":
        """Return a device of the user of `actor`."""
        device = cls(actor.account, actor.urls, actor.channels, seed, log_in=actor.log_in)
        device.token = actor.token
        device.others = actor.others
        device.mirror = copy.deepcopy(actor.mirror)
        device.mirror.wrong, device.mirror.shown = Counter(), set()
        return device

    def frame(self) -> Frame:
        """Return a random frame other than `presence`."""
        while isinstance(frame := super().frame(), client.SetPresence):
            pass
        return frame
