"""Products with packed weights for CPUs, compiled: the kernel "native" of lcq, which finds it where it is installed."""

from lcq_native.kernel import Native

__all__ = ["Native"]
