"""Tests over real sockets against a real PostgreSQL and Valkey, without mocks of the server and without sleeps."""
