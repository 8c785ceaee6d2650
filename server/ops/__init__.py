"""Work on a whole database while the server runs: checks, indexes, moving data."""
