"""Authentication: passwords, tokens, sessions, tickets and login attempts."""
