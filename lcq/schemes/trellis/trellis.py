"""Trellis-coded weights: paths through a trellis, found by dynamic programming."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from jaxtyping import Array

from lcq import forms
from lcq.forms.axes import block_lengths, checked_along, letters
from lcq.forms.base import Form
from lcq.forms.blocks import Per, block_counts
from lcq.forms.meshes import by_compiler, explicit_mesh, placed_on, spec_of
from lcq.forms.paths import piece_length
from lcq.forms.state_values import CODES
from lcq.schemes.base import SCHEMES, Earlier, Importance, Scalar, Scheme
from lcq.schemes.scales import check_float16, check_scale_dtype, scale_format
from lcq.schemes.trellis.search import Pieces, search


@SCHEMES.register("Trellis")
@dataclasses.dataclass(frozen=True)
class Trellis(Scheme):
    """Projection on paths through a bit-shift trellis: each weight takes `bits`, and its value is looked up by the last
    `memory` bits of its path.

        Pi(x) = argmin_{c, a} sum_i h_i (x_i - a t_{s_i})^2,    s_i = (s_{i-1} 2^bits + c_i) mod 2^memory

    On a Gaussian that is nearly 40 % less squared error than any codebook of four levels makes, at 2 bits; it costs
    2^memory operations a weight. For given scales the best path is found exactly (Viterbi), for given paths the best
    scales (least squares); the two alternate, and no step raises the error. Paths run along all axes of a leaf but the
    last, the outputs; of a vector along it. They are cut into equal pieces, and each bites its tail: so codes are all
    there is, and every weight can be read alone, by ceil(memory/bits) codes. A path that ends where it began costs
    something, so longer pieces are better.

    Attributes:
        bits: Bits of a code, 1 to 8.
        memory: Bits of a state, `bits` to 16; fewer where a piece has not as many.
        per: What shares one scale, see `lcq.forms.blocks.block_counts`.
        code: What a state stands for: "computed", a few operations on integers; "gaussian", a fixed table, 1 to 2 %
            better; "learned", a table of 2^memory float32 that is stored with the codes and fits other distributions.
        scale_dtype: Format of scales, see `Levels`.
        block: Weights of a piece, at least, where a path is longer: its pieces are equal, so they have as many as
            divide it. The search keeps 2^(memory - bits) bytes for each weight of the pieces that it has in hand.
        along: The axes along which paths run, counted from the end; None for all but the last.

    Raises:
        ValueError: a setting out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.sin(jnp.arange(64.0) ** 2)
        >>> two = Trellis(2, memory=8).project(x)
        >>> two.bits, float(jnp.mean((x - two.dense()) ** 2)) < 0.05
        (160, True)

    Source: Marcellin & Fischer, IEEE Trans. Comm. 38 (1990); bit-shift trellises for weights: Tseng et al., QTIP, arXiv
    2406.11235.
    """

    bits: int
    memory: int = 12
    per: Per = None
    code: str = "computed"
    scale_dtype: str | None = None
    block: int = 1024
    along: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name, value, low, high in (("bits", self.bits, 1, 8), ("memory", self.memory, self.bits, 16)):
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ValueError(f"expected {name} from {low} to {high}, got {value!r}")
        if self.code not in CODES:
            raise ValueError(f"expected code= one of {', '.join(CODES)}, got {self.code!r}")
        if isinstance(self.block, bool) or not isinstance(self.block, int) or self.block < 1:
            raise ValueError(f"expected block= a number of weights, at least 1, got {self.block!r}")
        object.__setattr__(self, "along", checked_along(self.along))
        check_scale_dtype(self.scale_dtype)

    def check(self, shape: tuple[int, ...]) -> None:
        block_counts(self.per, shape)
        if self.along is not None and -min(self.along) > len(shape):
            raise ValueError(f"along={self.along!r} needs at least {-min(self.along)} axes, got shape {shape}")

    def check_numbers(self, x: Array) -> None:
        if self.scale_dtype == "float16":
            check_float16(x, 4.0)

    @property
    def cuts(self) -> tuple[Per, ...]:
        return (self.per,)

    def oriented(self, layout: str, rank: int) -> Scheme:
        per, dtype = self.per, self.scale_dtype
        if per is not None:
            per = block_lengths(per, layout, rank)
            dtype = "bfloat16" if dtype is None and isinstance(self.per, int) else dtype
        along = tuple(i - rank for i, letter in enumerate(letters(layout, rank)) if letter != "o")
        return dataclasses.replace(self, per=per, scale_dtype=dtype, along=self.along or along)

    def solve(
        self, xs: tuple[Array, ...], previous: Earlier, mu: Scalar | None, importance: Importance = None
    ) -> tuple[Form, ...]:
        del mu
        runs = [self._along(x.ndim) for x in xs]
        lengths = [
            piece_length(math.prod(x.shape[i] for i in run), self.block) for x, run in zip(xs, runs, strict=True)
        ]
        memory = max(min(self.memory, self.bits * min(lengths)), self.bits)
        how: Any = {"width": self.bits, "memory": memory, "code": self.code}
        pieces = tuple(map(Pieces, runs, lengths))

        def found(xs: Any, importance: Any, given: Any) -> list[dict[str, Array | None]]:
            dtype = scale_format(self.per, self.scale_dtype)
            return search(xs, importance, self.per, pieces, dtype, given, **how)

        given = None if previous is None else [_arrays(form) for form in previous]
        parts = by_compiler(found, self._onto(xs), xs, importance, given)
        return tuple(
            forms.Trellis(**part, **how, along=piece.along, length=piece.length, dtype=str(x.dtype))
            for x, part, piece in zip(xs, parts, pieces, strict=True)
        )

    def _along(self, rank: int) -> tuple[int, ...]:
        return self.along or tuple(range(-rank, -1)) or tuple(range(-rank, 0))

    def _onto(self, xs: Sequence[Array]) -> list[dict[str, Any]] | None:
        """How the arrays of the forms lie on a mesh with explicit axes: codes as the leaf does, the rest everywhere."""
        mesh = explicit_mesh(*xs)
        if mesh is None:
            return None
        whole = placed_on(mesh, ())
        table = whole if self.code == "learned" else None
        return [{"steps": placed_on(mesh, spec_of(x)), "scale": whole, "table": table} for x in xs]


def _arrays(form: Form) -> dict[str, Array | None]:
    assert isinstance(form, forms.Trellis)
    return {"steps": form.unpack().steps, "scale": form.scale, "table": form.table}
