"""Who chooses w: one algorithm a file."""
