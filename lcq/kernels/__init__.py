"""Products with forms."""

from lcq.kernels.api import binary_matmul, matmul

__all__ = ["binary_matmul", "matmul"]
