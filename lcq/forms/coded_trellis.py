"""CodedTrellis: integers and a scale; those before it say whether one is even or odd."""

import dataclasses
import functools
import math
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, UInt

from lcq.forms import bitpack
from lcq.forms.axes import shares
from lcq.forms.base import Form, leafwise, own, register_form, static
from lcq.forms.codes import Codes
from lcq.forms.convolution import POLYNOMIALS, merged
from lcq.forms.processes import on_host
from lcq.forms.relayout import MatrixView, Relayout
from lcq.forms.validate import check_blocks, check_float, check_shape, check_words


@register_form
class CodedTrellis(Form):
    """Integers c along paths through the leaf, Delta = scale (c - 2^(width - 1)), made to be entropy-coded.

    Whether a weight's integer is even or odd follows from those before it in its path (`lcq.forms.convolution`). So of
    each only c div 2 is stored, in two streams: of the even integers and of the odd ones. Each has a table of
    frequencies of its own in a coded file, which is what coding for a given state takes; a path starts in state 0.

    Paths lie side by side: of P of them the first takes the weights 0, P, 2 P, .. of a layer, in row-major order, the
    next one those behind them. So streams run through the weights as these lie, and neighbours that are alike stay
    together. Where weights are moved, taken apart or multiplied, the form is one of plain `Codes`: they are decoded
    once, and products are with integers.

    Attributes:
        codes: c, uint8 or uint16 of the leaf's shape. In the stored layout packed uint32 words: c div 2 of the even
            integers; the first weights of all paths, layer by layer, then the second ones, and so on.
        odd: of the odd integers the same; None in the working layout.
        scale: [*blocks], one for the leaf, or for each layer of a stack.
        width: bits of c, 3 to 16.
        memory: bits of a state, 2 to 8.
        length: weights of a path.
        packed: the leaf's shape if the layout is stored, None if it is working.
        even: how many integers are even, in the stored layout.
    """

    codes: Any = leafwise()
    odd: Any = own(default=None)
    scale: Any = None
    width: int = static(default=8)
    memory: int = static(default=8)
    length: int = static(default=1)
    packed: tuple[int, ...] | None = static(default=None)
    even: int = static(default=0)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape if self.packed is None else self.packed

    @property
    def bits(self) -> int:
        return math.prod(self.shape) * (self.width - 1) + self.shared_bits

    @property
    def shared_bits(self) -> int:
        return 8 * self.scale.size * self.scale.dtype.itemsize

    @property
    def alphabets(self) -> dict[str, tuple[int, int]]:
        levels = 1 << (self.width - 1)
        return {"codes": (levels, self.even), "odd": (levels, math.prod(self.shape) - self.even)}

    @property
    def ranges(self) -> dict[str, int]:
        return {"codes": 1 << self.width}

    def pack(self) -> Self:
        if self.packed is not None:
            return self
        host = jax.device_get(on_host(self))
        codes = host.codes.reshape(host.scale.size, self.length, -1).swapaxes(0, 1)
        even, odd = (codes[codes % 2 == kind] >> 1 for kind in (0, 1))
        words = [bitpack.pack(part, self.width - 1) for part in (even, odd)]
        return dataclasses.replace(
            host, codes=words[0], odd=words[1], packed=tuple(self.codes.shape), even=int(even.size)
        )

    def unpack(self) -> Self:
        if self.packed is None:
            return self
        size = math.prod(self.packed)
        if size >= 1 << 31:
            raise ValueError(
                f"expected fewer than 2^31 weights on a coded trellis, got {list(self.packed)}: places in it are "
                "numbered in 32 bits; compress the layers stacked in it as leaves of their own"
            )
        words = jnp.asarray(self.codes), jnp.asarray(self.odd)
        how = {"width": self.width, "memory": self.memory, "length": self.length, "layers": self.scale.size}
        codes = _unpacked(*words, even=self.even, shape=tuple(self.packed), **how)
        return dataclasses.replace(self, codes=codes, odd=None, packed=None, even=0)

    def as_codes(self) -> Codes:
        """The same numbers as plain codes, in the working layout.

        Example:
            >>> import lcq
            >>> form = lcq.CodedTrellis(rate=0.01).project(jnp.array([0.0, 0.5, -1.0, 2.0]))
            >>> bool((form.as_codes().dense() == form.dense()).all()), form.as_codes().size_of_table
            (True, 256)
        """
        form = self.unpack()
        return Codes(form.codes, scale=form.scale, values=_values(self.width), dtype=self.dtype, shared=self.shared)

    def dense(self) -> Array:
        return self.as_codes().dense()

    def describe(self) -> str:
        words = [f"coded trellis, {1 << self.memory} states"]
        words += [f"{self.scale.size} scales"] if self.scale.size > 1 else []
        return ", ".join(words)

    def one_per(self) -> str:
        return shares(self.shape, self.scale.shape)

    def relayout(self, change: Relayout) -> Form | None:
        return self if change.idle else self.as_codes().relayout(change)

    def take_rows(self, rows: Int[Array, " R"]) -> Form | None:
        return self.as_codes().take_rows(rows)

    def unstack(self) -> Form | None:
        return self.as_codes().unstack()

    def prepack(self, view: MatrixView | None = None, *, traced: bool = False) -> Form:
        """As `Codes` are; a vector as it is."""
        return self if len(self.shape) < 2 else self.as_codes().prepack(view, traced=traced)

    def check_stored(self) -> None:
        if self.packed is None or self.odd is None:
            raise ValueError("expected packed integers with the leaf's shape, got the working layout")
        check_shape(self.packed)
        check_float("dtype", self.dtype)
        if self.scale is None:
            raise ValueError("scale: expected one, got none")
        check_blocks(self.packed, {"scale": self.scale})
        if not 3 <= self.width <= 16 or self.memory not in POLYNOMIALS:
            raise ValueError(f"expected width 3 to 16 and memory 2 to 8, got {self.width} and {self.memory}")
        size = math.prod(self.packed)
        layers = self.scale.size
        if not (0 <= self.even <= size and self.length >= 1 and size % (self.length * layers) == 0):
            raise ValueError(
                f"expected at most {size} even integers and paths that divide {layers} layers of {size} weights, got "
                f"{self.even} and paths of {self.length}"
            )
        for name, words, count in (("codes", self.codes, self.even), ("odd", self.odd, size - self.even)):
            check_words(name, words, count, 1 << (self.width - 1))


@functools.cache
def _values(width: int) -> tuple[float, ...]:
    half = 1 << (width - 1)
    return tuple(map(float, range(-half, half)))


@functools.partial(jax.jit, static_argnames=("even", "shape", "width", "memory", "length", "layers"), inline=True)
def _unpacked(
    words: Array, odd: Array, *, even: int, shape: tuple[int, ...], width: int, memory: int, length: int, layers: int
) -> UInt[Array, "..."]:
    size = math.prod(shape)
    halves = bitpack.unpack(words, width - 1, (even,)), bitpack.unpack(odd, width - 1, (size - even,))
    codes = merged(*halves, length, size // length, memory).reshape(length, layers, -1).swapaxes(0, 1)
    return codes.astype(jnp.uint8 if width <= 8 else jnp.uint16).reshape(shape)
