"""`OnlineUsers`: a change between the authentication of a session and the first check is not missed."""

from protocol.errors import CloseCode
from server.gateway.connection import Connection
from tests.world import World


async def test_session_revoked_while_its_socket_connects_closes_the_socket(world: World) -> None:
    who = await world.user("Ada")
    app = world.workers[0].app
    stale = await app.sessions.authenticate(who.token)
    # The session is revoked before the socket is added, and no worker is notified.
    await world.db.execute("DELETE FROM session")
    await world.db.execute('UPDATE "user" SET version = version + 1')
    other = await world.user("Charles")
    one = await world.connect(other)
    (held,) = app.hub.online_users.sockets(other.id)
    assert isinstance(held, Connection)
    held.session_id, held.user_id = stale.session_id, who.id
    await app.hub.online_users.add(held, stale.user_version)
    assert await one.closed() == CloseCode.SESSION_ENDED
