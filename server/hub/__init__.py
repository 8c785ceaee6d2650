"""Fan-out of events to sockets, and the bus between workers."""
