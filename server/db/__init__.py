"""The connections to PostgreSQL: nothing else opens any."""
