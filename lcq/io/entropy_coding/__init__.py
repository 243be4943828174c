"""Lane-interleaved rANS over blocks of codes, and what a code costs."""
