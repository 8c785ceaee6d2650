"""What everything stands on; it imports nothing else of ours."""
