"""Connections that do nothing, and connections that come all at once."""

from loadtest.scenario import Scenario


class Idle(Scenario):
    """What it costs to be there."""

    name = "idle"
    about = "5,000 authenticated connections and silence"
    people = 1_000
    connections = 5_000
    unit = ""


class Storm(Scenario):
    """Connect and authenticate as fast as it goes; everything there is to measure is over when all are there."""

    name = "storm"
    about = "2,000 connect and authenticate as fast as it goes"
    people = 2_000
    unit = ""
