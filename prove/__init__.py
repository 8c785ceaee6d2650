"""`openchat prove`: a crowd that uses every frame, a schedule of faults, and a checker of the results.

The checker knows only the wire format and the rows in PostgreSQL.
"""
