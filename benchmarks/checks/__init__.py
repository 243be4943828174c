"""Exact, trusted, verified: what holds or does not."""
