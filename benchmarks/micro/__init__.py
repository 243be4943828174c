"""Speed: times and memory."""
