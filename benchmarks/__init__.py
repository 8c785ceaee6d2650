"""Benchmarks: `make bench`, `make scale`, `make search` and `make worst`."""
