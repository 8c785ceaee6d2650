"""Idle connections, and many connections in a short time."""

from loadtest.scenario import Scenario


class Idle(Scenario):
    """Measures the cost of idle connections."""

    name = "idle"
    about = "5,000 authenticated connections without frames"
    people = 1_000
    connections = 5_000
    unit = ""


class Storm(Scenario):
    """Connect and authenticate as fast as possible. The scenario ends when all connections are open."""

    name = "storm"
    about = "2,000 connections, opened and authenticated as fast as possible"
    people = 2_000
    unit = ""
