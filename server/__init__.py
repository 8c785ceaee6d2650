"""The server: docs/map.md lists its rooms. `cli` starts it, `app` builds it, `routes` lists the frames."""
