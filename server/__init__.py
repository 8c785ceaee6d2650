"""The server. `cli` starts it, `app` builds it, `routes` lists what it understands."""
