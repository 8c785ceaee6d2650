"""Another device of a simulated user."""

from protocol import client
from protocol.client import Frame
from prove.actor import Actor


class Device(Actor):
    """A further device of an actor's account, with its own mirror. It leaves the user's presence to the actor."""

    @classmethod
    def of(cls, actor: Actor, seed: int) -> "Device":
        """Return a device of the user of `actor`."""
        device = cls(actor.account, actor.urls, actor.channels, seed, log_in=actor.log_in)
        device.token = actor.token
        device.others = actor.others
        return device

    def frame(self) -> Frame:
        """Return a random frame other than `presence`."""
        while isinstance(frame := super().frame(), client.SetPresence):
            pass
        return frame
