"""Times in the range of Python, for pages that are sorted by time."""

MOMENT = """CASE WHEN {at} >= '0001-01-02' THEN least({at}, '9999-12-30') END"""
"""A time within the years 1 to 9999. A later one becomes the last of these, and an earlier one NULL. A restored row may
have any time, and reading an invalid one would fail the page.
"""
