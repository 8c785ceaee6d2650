"""What several handlers share: rules and features, without sockets and HTTP."""
