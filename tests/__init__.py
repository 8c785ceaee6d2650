"""Proof, over real sockets against the real PostgreSQL and Valkey. Nothing of ours is mocked, nothing sleeps."""
