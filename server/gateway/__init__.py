"""The transport of one socket: bytes, frames in order and a reply for each. Also the registry of all connections."""
