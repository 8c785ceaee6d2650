"""The table of the scenarios of `openchat load`."""

from loadtest.scenario import Scenario
from loadtest.scenarios.bystander import Bystander
from loadtest.scenarios.history import History
from loadtest.scenarios.hot import Busy, Filling, Joining, Reacting, Voting, Writing
from loadtest.scenarios.messages import Messages
from loadtest.scenarios.mixed import Mixed
from loadtest.scenarios.people import People
from loadtest.scenarios.presence import Presence
from loadtest.scenarios.quiet import Idle, Storm
from loadtest.scenarios.resume import Resume
from loadtest.scenarios.talk import Direct, Room, Teams

SCENARIOS: dict[str, type[Scenario]] = {
    one.name: one
    for one in (Room, Teams, Direct, Idle, Storm, Presence, Resume, History, Mixed, People, Messages, Bystander)
}
HOT: dict[str, type[Scenario]] = {one.name: one for one in (Reacting, Voting, Writing, Filling, Joining, Busy)}
"""The scenarios that `bystander` runs beside the strangers. The command does not run them alone."""
ALL = SCENARIOS | HOT
