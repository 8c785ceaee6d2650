"""The embedded PostgreSQL and Valkey, which the supervisor owns."""
