"""Trellis-coded weights."""

from lcq.schemes.trellis.trellis import Trellis

__all__ = ["Trellis"]


def __dir__() -> list[str]:
    return sorted(__all__)
