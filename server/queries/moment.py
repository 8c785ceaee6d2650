"""Times as Python can hold them, for pages that are sorted by time."""

MOMENT = """CASE WHEN {at} >= '0001-01-02' THEN least({at}, '9999-12-30') END"""
"""A time from the years 1 to 9999, near the end of those for a later one, NULL for an earlier one: a restored row may
have any, and reading it would end the page.
"""
