"""The servers that come with OpenChat: a PostgreSQL and a Valkey of one's own, owned by the supervisor."""
