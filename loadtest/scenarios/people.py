"""People who look each other up, send friend requests, follow each other, and arrange their conversations."""

from uuid import UUID

from loadtest.connection import Connection
from loadtest.scenario import Scenario
from protocol import client
from protocol.client import Frame
from protocol.ids import ConversationId, UserId


class People(Scenario):
    """The actions and their weights are in `_frame`."""

    name = "people"
    about = (
        "500 people in teams of 10 who look each other up, befriend and follow each other, and arrange conversations"
    )
    unit = "actions"
    people = 500
    rate = 200.0

    def act(self, due: int) -> None:
        connection = self.random.choice(self.crowd.connections)
        if connection.is_open and connection.user.conversations:
            connection.ask(self._frame(connection), due)

    def _frame(self, connection: Connection) -> Frame:
        about = self.random.choice(connection.user.conversations)
        others = [one for one in self.crowd.members[about] if one != connection.user.user_id]
        other = UserId(UUID(self.random.choice(others)))
        place = self.random.randint(0, 9)
        makes = (
            (30, lambda: client.GetProfile(user_id=other)),
            (15, lambda: client.SearchUsers(text=f"crowd {place}")),
            (15, lambda: client.SetPreferences(conversation_id=ConversationId(UUID(about)), pin_order=place)),
            (10, client.ListRelationships),
            (10, lambda: client.RequestFriend(user_id=other)),
            (10, lambda: client.Follow(user_id=other)),
            (5, lambda: client.UpdateProfile(bio=f"In my {place}th year")),
            (5, client.ListInvitations),
        )
        (make,) = self.random.choices([make for _, make in makes], [share for share, _ in makes])
        return make()
