"""Queues, batches and shares: who waits for whom."""
