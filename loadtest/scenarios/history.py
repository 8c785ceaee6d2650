"""Random pages in one very long conversation."""

import hashlib
from uuid import UUID

from loadtest.scenario import Layout, Scenario, Size
from protocol import client
from protocol.ids import ConversationId, MessageId

TALKERS = 50
"""Number of people who write the conversation before the run."""
EPOCH_MS = 1_700_000_000_000


class History(Scenario):
    """Each action reads a page around a random message."""

    name = "history"
    about = "random pages in a conversation of 1,000,000"
    unit = "pages"
    people = 100
    group = 100
    rate = 200.0

    @classmethod
    def layout(cls, size: Size) -> Layout:
        everyone = list(range(size.people))
        return Layout(people=size.people, groups=[everyone], talkers=min(TALKERS, size.people), is_kept=True)

    def act(self, due: int) -> None:
        connection = self.random.choice(self.crowd.connections)
        about = connection.user.conversations[0]
        anchor = message_id(about, self.random.randrange(self.size.messages))
        connection.ask(client.History(conversation_id=ConversationId(UUID(about)), around=anchor, limit=50), due)


def message_id(conversation_id: str, number: int) -> MessageId:
    """Return the id of a conversation's message by its number, a UUIDv7. It is computed, so no run has to store it."""
    high = (EPOCH_MS + number) << 80 | 0x7 << 76
    low = int.from_bytes(hashlib.blake2b(f"{conversation_id} {number}".encode(), digest_size=8).digest())
    return MessageId(UUID(int=high | 0b10 << 62 | low & 0x3FFF_FFFF_FFFF_FFFF))
