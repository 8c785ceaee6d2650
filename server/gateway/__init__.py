"""One socket: bytes, frames in order, an answer for each; and the registry of all connections."""
