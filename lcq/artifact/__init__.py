"""Shipping a compressed tree: forms as named streams, the `.lcq` file, checkpoints in and out."""
