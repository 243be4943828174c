"""Layers whose activations and weights are binary, for flax linen and nnx."""
