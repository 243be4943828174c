"""`Facts`: what the documentation says of a format, kept beside its code."""

import inspect
from typing import NamedTuple


class Facts(NamedTuple):
    """A row of the table of all formats.

    Attributes:
        file: what it is, and of which program.
        weights: what numbers become that are no codes.
        codes: what codes become; "" if there are none.
        refused: what it does not take.
    """

    file: str
    weights: str
    codes: str = ""
    refused: str = ""


def facts_of(format: type, suffix: str) -> Facts:
    """Those of a format that says no more: how its files end, and the first line of its docstring."""
    line = (inspect.getdoc(format) or "").split("\n")[0]
    return Facts(f"`{suffix}`" if suffix else "a folder", line)
