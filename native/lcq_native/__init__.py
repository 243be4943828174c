"""Products with packed weights for CPUs, compiled: the kernel "native" of lcq, which finds it where it is installed."""

from lcq_native.kernel import Native
from lcq_native.library import instruction_set

__all__ = ["Native", "instruction_set"]
