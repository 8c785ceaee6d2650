"""The connections to PostgreSQL. No other room opens any."""
