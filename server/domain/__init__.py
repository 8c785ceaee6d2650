"""Rules and features that several handlers share, without sockets and HTTP."""
