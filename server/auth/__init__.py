"""Identity: passwords, tokens, sessions, tickets."""
