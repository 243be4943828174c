"""How the bytes of a stream in a coded file stand for its array: one codec a file."""

from lcq.io.codecs.base import CODECS, Codec, Stream
from lcq.io.codecs.rans import Rans
from lcq.io.codecs.raw import Raw

DEFAULT = ("rans",)
"""Names of those that `save` tries unless told otherwise."""

__all__ = ["CODECS", "DEFAULT", "Codec", "Rans", "Raw", "Stream"]


def __dir__() -> list[str]:
    return sorted(__all__)
