"""Products with forms."""
