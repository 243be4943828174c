"""What a stored form must be, whoever wrote the file, and whose fault it is if something is not so."""

import contextlib
import dis
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from lcq.forms import bitpack
from lcq.forms.dtypes import FORMATS

_BELOW = {"chex", "flax", "jax", "jaxlib", "numpy", "optax"}


@contextlib.contextmanager
def named(place: str, remedy: str = "") -> Iterator[None]:
    """Puts `place` before the words of ValueErrors that `finds_fault`, and a remedy behind; others keep their own."""
    try:
        yield
    except ValueError as error:
        if not finds_fault(error):
            raise
        raise ValueError(f"{place}: {error}{remedy}") from error


def finds_fault(error: ValueError) -> bool:
    """Whether a check raised it: of lcq, or of a form, scheme or codec. Errors of JAX may be about anything.

    JAX may cut its own frames out of a traceback: the last one is a check only if it stands at a `raise`.
    """
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None or last.tb_frame.f_globals.get("__name__", "").partition(".")[0] in _BELOW:
        return False
    return dis.opname[last.tb_frame.f_code.co_code[last.tb_lasti]] == "RAISE_VARARGS"


def check_shape(shape: tuple[int, ...]) -> None:
    """Raises ValueError unless an array could have this shape."""
    fits = len(shape) <= 64 and all(0 <= n < 1 << 63 for n in shape) and math.prod(n or 1 for n in shape) < 1 << 63
    if not fits:
        raise ValueError(f"expected a shape of at most 64 axes and 2^63 elements, got {str(shape)[:200]}")


def check_float(name: str, dtype: str) -> None:
    """Raises ValueError unless `dtype` is the name of a floating-point dtype."""
    if dtype not in FORMATS:
        raise ValueError(f"{name}: expected one of {', '.join(FORMATS)}, got {dtype[:40]!r}")


def check_counts(name: str, shape: tuple[int, ...], counts: tuple[int, ...]) -> None:
    """Raises ValueError unless there can be so many blocks along each axis of the leaf."""
    if len(counts) != len(shape) or any(c < 1 or n % c for c, n in zip(counts, shape, strict=True)):
        raise ValueError(f"{name}: expected block counts that divide {list(shape)}, got {list(counts)}")


def check_axes(name: str, shape: tuple[int, ...], axes: tuple[int, ...]) -> None:
    """Raises ValueError unless these are axes of the leaf, counted from the end, none of them twice."""
    if len(set(axes)) < len(axes) or not all(-len(shape) <= axis < 0 for axis in axes):
        raise ValueError(f"{name}: expected axes of {list(shape)} counted from the end, got {list(axes)}")


def check_blocks(shape: tuple[int, ...], arrays: dict[str, Any]) -> None:
    """Of what has one entry per block: floats, the same blocks in all, and these divide the leaf's axes."""
    seen = None
    for name, array in arrays.items():
        if array is None:
            continue
        check_float(name, str(array.dtype))
        counts = array.shape[:-1] if name == "levels" else array.shape
        check_counts(name, shape, counts)
        if seen not in (None, counts):
            raise ValueError(f"{name}: expected the same blocks in all of {', '.join(arrays)}, got {counts} and {seen}")
        seen = counts


def check_words(name: str, words: Any, size: int, levels: int) -> None:
    """Raises ValueError unless these are so many packed codes, all below `levels`."""
    bits = bitpack.width(levels)
    many = bitpack.word_count(size, bits)
    if words is None or words.dtype != np.uint32 or words.shape != (many,):
        got = "none" if words is None else f"{words.dtype}{list(words.shape)}"
        raise ValueError(f"{name}: expected uint32[{many}] for {size} codes of {bits} bits, got {got}")
    check_codes(name, words, size, levels)


def check_codes(name: str, words: Any, size: int, levels: int) -> None:
    """Raises ValueError unless packed codes are below `levels`, of words on the host or a device; structs pass."""
    bits = bitpack.width(levels)
    if levels == 1 << bits:
        return  # every code is one
    if isinstance(words, np.ndarray):
        largest = bitpack.unpack_host(words, bits, size).max(initial=0)
    elif isinstance(words, jax.Array):
        largest = bitpack.unpack(words, bits, (size,)).max(initial=0)
    else:
        return
    if int(largest) >= levels:
        raise ValueError(f"{name}: expected codes below {levels}, got a larger one")
