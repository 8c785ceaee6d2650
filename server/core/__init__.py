"""Settings, errors, the log, metrics and periodic jobs: the foundation of all rooms. It imports none of them."""
