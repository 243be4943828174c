"""What a leaf takes in a coded file, and what its codes' entropy would allow."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from lcq.forms import bitpack
from lcq.forms.base import Form, is_form
from lcq.io.entropy_coding import rans


class CodedBits(NamedTuple):
    """Bits of a leaf; in both, what is no code counts as it is.

    Attributes:
        entropy: count * H of every stream of codes, H = -sum_k p_k log2 p_k of single codes.
        coded: those that `save` writes, tables included, names and digests not. Blocks of several codes can bring it
            below the entropy.
    """

    entropy: float
    coded: int

    def __add__(self, other: Any) -> "CodedBits":
        return CodedBits(self.entropy + other.entropy, self.coded + other.coded)


def coded_bits(leaf: PyTree) -> CodedBits:
    """Bits of a form or an array; of what a joint task shares, all.

    Example:
        >>> import lcq, numpy as np
        >>> form = lcq.KMeans(2).project(np.repeat(np.array([0, 0, 0, 1], np.float32), 1000))
        >>> form.bits, round(coded_bits(form).entropy), coded_bits(form).coded < 3500
        (4064, 3309, True)
    """
    if isinstance(leaf, tuple):
        return sum(map(coded_bits, leaf), CodedBits(0.0, 0))
    if not is_form(leaf):
        array = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)  # a key is no numpy array
        bits = 0 if leaf is None else 8 * array.size * array.dtype.itemsize
        return CodedBits(bits, bits)
    form = leaf.pack()
    total = CodedBits(0.0, 0)
    for name, value in _fields(form).items():
        levels, count = form.alphabets.get(name, (1, 0))
        if levels == 1:
            total += coded_bits(value)
            continue
        words = value if isinstance(value, np.ndarray) else jax.device_get(value)
        codes = bitpack.unpack_host(words, bitpack.width(levels), count)
        total += CodedBits(count * rans.entropy(codes, levels), 8 * len(rans.encode(codes, levels)))
    return total


def _fields(form: Form) -> dict[str, PyTree]:
    """Fields that are arrays, forms or tuples of them, by name."""
    return {name: value for name, value in vars(form).items() if _holds_arrays(value)}


def _holds_arrays(value: object) -> bool:
    if value is None or isinstance(value, int | float | str):
        return False
    if isinstance(value, tuple):
        return any(map(_holds_arrays, value))
    return isinstance(value, np.ndarray | jax.Array) or is_form(value)
