"""Fan-out: which socket follows what, and the bus between workers."""
