"""How fast: times and memory."""
