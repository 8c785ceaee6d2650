"""`openchat load`: load tests over the wire protocol."""
