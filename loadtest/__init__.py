"""A crowd that speaks the protocol."""
