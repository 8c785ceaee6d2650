"""The processes of an installation: supervisor, workers, embedded PostgreSQL and Valkey."""
