"""Work on a whole database while the server runs: checks, the search index, exports and imports."""
