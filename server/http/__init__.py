"""The HTTP side: endpoints, accounts, and their descriptions."""
