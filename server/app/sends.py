"""How a worker stores the messages of its users: in batches, by a statement for plain ones and one for all others."""

from protocol.ids import ConversationId
from server.db.database import Database
from server.fairness.lanes import Held, Lanes
from server.fairness.lock_queue import Places
from server.fairness.shortcut import Shortcut
from server.queries import sending
from server.queries.sending import NotStored, Outgoing, Stored

MAX_BATCH_MESSAGES = 64
"""Max messages that one statement stores."""
MAX_BATCH_CHARACTERS = 32_000
"""Max characters of messages with their payloads in one statement. A single message may have more.

The statement holds the locks of all their conversations. 64 messages of the max size would hold them for a second.
Messages with more than 2,000 characters are stored in statements of their own.
"""


def sends_of(database: Database, places: Places) -> Shortcut[ConversationId, Outgoing, Stored | NotStored]:
    """Return the batches of messages of a worker. `places` are those of all lanes."""

    async def send_plain(batch: list[Outgoing]) -> list[Stored | NotStored | None]:
        async with database.sending() as db:
            return [*await sending.send_plain(db, batch)]

    async def send_free(batch: list[Outgoing]) -> list[Stored | NotStored | Held]:
        async with database.sending() as db:
            return await sending.send_free(db, batch)

    async def send(batch: list[Outgoing]) -> list[Stored | NotStored | Held]:
        async with database.connection() as db:
            return await sending.send(db, batch)

    lanes: Lanes[ConversationId, Outgoing, Stored | NotStored] = Lanes(
        key=lambda out: out.frame.conversation_id,
        owner=lambda out: out.sender_id,
        run=send_free,
        wait=send,
        places=places,
        most=MAX_BATCH_MESSAGES,
        weigh=sending.weight,
        most_weight=MAX_BATCH_CHARACTERS,
    )
    return Shortcut(lanes, takes=sending.is_plain, run=send_plain)
