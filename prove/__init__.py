"""The proof: a crowd that does everything, a schedule of faults, a checker that knows only the wire and the rows."""
