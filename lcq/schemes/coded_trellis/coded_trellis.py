"""Integers on a trellis, made to be entropy-coded: ECTCQ, or dependent quantization."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lcq import forms
from lcq.forms.base import Form
from lcq.forms.convolution import POLYNOMIALS
from lcq.forms.meshes import by_compiler, explicit_mesh, placed_on, spec_of
from lcq.forms.paths import piece_length
from lcq.schemes.base import SCHEMES, Earlier, Importance, Scalar, Scheme
from lcq.schemes.coded_trellis.search import counted, entropy_bits, search
from lcq.schemes.scales import check_scale_dtype


@SCHEMES.register("CodedTrellis")
@dataclasses.dataclass(frozen=True)
class CodedTrellis(Scheme):
    """Projection on integers along a trellis, for files: fewer bytes than codebooks at equal distance.

        Pi(x) = argmin_{z, a} sum_i h_i (x_i - a z_i)^2 + rate sum_i len(z_i),    len(z) = -log2 p(z | parity of z)

    Whether z_i is even or odd is said by a state of `memory` bits, to which the integers before it in their path have
    led (`lcq.forms.convolution`). So a weight has steps of 2 a to choose from, and pays for these, while all together
    lie as near as a denser lattice allows: fewer bits than `KMeans(rate=)` takes at an equal error, by a fifth of a
    bit a weight on a Gaussian.

    For given lengths and scale the best path is found exactly (Viterbi), for a given path the best scale (least
    squares) and the best lengths (counts, of each leaf); they alternate. One scale serves the leaf: with one rate,
    equal steps are the best division of bits between blocks. Leaves of a joint task share it, too. What is saved has
    two streams of integers, each with its own table of frequencies; products are with decoded integers.

    Attributes:
        rate: Squared distance that one bit is worth, times the importance where there is one; as in `KMeans(rate=)`.
            The scale follows from it, about 1.5 sqrt(rate).
        memory: Bits of a state, 2 to 8. The search takes some 2^(memory + 2) operations a weight and pass.
        width: Bits of an integer before it is coded, 3 to 16: the largest weight over the scale has to be below
            2^(width - 1), or the scale grows until it is.
        scale_dtype: Format of the scale: "float32", "bfloat16" or "float16"; None for float32.
        block: Weights of a path, at least; paths are equally long, and each begins in state 0.

    Raises:
        ValueError: a setting out of range.

    Example:
        >>> import jax, lcq
        >>> from lcq.io.entropy_coding.coded_bits import coded_bits
        >>> x = jax.random.normal(jax.random.key(0), (64, 64))
        >>> two = [scheme.project(x) for scheme in (CodedTrellis(0.1), lcq.KMeans(16, rate=0.1))]
        >>> error, other = (float(((x - form.dense()) ** 2).mean()) for form in two)
        >>> size, more = (coded_bits(form).coded for form in two)
        >>> error < other, size < 0.95 * more
        (True, True)

    Source: Fischer & Wang, IEEE Trans. IT 38 (1992); Marcellin, IEEE Trans. Comm. 42 (1994); dependent quantization of
    nets: Haase et al., ICIP 2020, and ISO/IEC 15938-17.
    """

    rate: float
    memory: int = 8
    width: int = 8
    scale_dtype: str | None = None
    block: int = 1024

    def __post_init__(self) -> None:
        if not isinstance(self.rate, int | float | np.number) or not 0 < self.rate <= np.finfo(np.float32).max:
            raise ValueError(f"expected a rate > 0, finite in float32, got {self.rate!r}; KMeans(k) has none")
        object.__setattr__(self, "rate", float(self.rate))
        for name, value, low, high in (
            ("memory", self.memory, min(POLYNOMIALS), max(POLYNOMIALS)),
            ("width", self.width, 3, 16),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ValueError(f"expected {name} from {low} to {high}, got {value!r}")
        if isinstance(self.block, bool) or not isinstance(self.block, int) or self.block < 1:
            raise ValueError(f"expected block= a number of weights, at least 1, got {self.block!r}")
        check_scale_dtype(self.scale_dtype)

    def check(self, shape: tuple[int, ...]) -> None:
        del shape  # paths run through any

    def solve(
        self, xs: tuple[Array, ...], previous: Earlier, mu: Scalar | None, importance: Importance = None
    ) -> tuple[Form, ...]:
        del mu
        how: Any = {"width": self.width, "memory": self.memory}
        paths = [piece_length(math.prod(x.shape), self.block) for x in xs]

        def found(xs: Any, importance: Any, given: Any) -> list[dict[str, Array]]:
            return search(xs, importance, self.rate, paths, self.scale_dtype, given, **how)

        given = None if previous is None else [{"codes": f.codes, "scale": f.scale} for f in _working(previous)]
        parts = by_compiler(found, self._onto(xs), xs, importance, given)
        return tuple(
            forms.CodedTrellis(**part, **how, length=length, dtype=str(x.dtype))
            for x, part, length in zip(xs, parts, paths, strict=True)
        )

    def charge(self, forms: tuple[Form, ...], mu: Scalar | None) -> Scalar:
        """rate sum_i len(z_i), of each leaf."""
        del mu
        levels = 1 << self.width
        counts = [counted(form.codes.reshape(-1), levels).astype(jnp.float32) for form in _working(forms)]
        return self.rate * jnp.stack([entropy_bits(n) for n in counts]).sum()

    def _onto(self, xs: Sequence[Array]) -> list[dict[str, Any]] | None:
        """How the arrays of the forms lie on a mesh with explicit axes: codes as the leaf does, the scale on all."""
        mesh = explicit_mesh(*xs)
        if mesh is None:
            return None
        return [{"codes": placed_on(mesh, spec_of(x)), "scale": placed_on(mesh, ())} for x in xs]


def _working(given: Sequence[Form]) -> list[forms.CodedTrellis]:
    return [form.unpack() for form in given if isinstance(form, forms.CodedTrellis)]
