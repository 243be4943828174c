"""How arrays become forms: one family of C steps a file. A scheme sees arrays, never trees."""
