"""Who somebody is: passwords, tokens, sessions, and the HTTP endpoints for them."""
