"""Integers on a trellis, made to be entropy-coded."""

from lcq.schemes.coded_trellis.coded_trellis import CodedTrellis

__all__ = ["CodedTrellis"]


def __dir__() -> list[str]:
    return sorted(__all__)
