"""Functions on forms in place of parameters."""

from lcq.runtime.interpreter import Use
from lcq.runtime.packed import Packed, packed

__all__ = ["Packed", "Use", "packed"]


def __dir__() -> list[str]:
    return sorted(__all__)
