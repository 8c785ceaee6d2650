"""The comparison: `make bench`."""
