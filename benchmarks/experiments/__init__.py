"""Accuracy: errors of compressed nets, and their bytes."""
