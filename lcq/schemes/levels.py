"""Fixed codebooks, with or without a free scale: binary, ternary, powers of two, any list of values.

    Pi(x) = argmin_{k, a} sum_i h_i (x_i - a c_{k_i})^2      a = 1, or a free per block; h = 1, or given

For given codes the best scale is a = A/B with A = sum h x c, B = sum h c^2, and leaves the error sum h x^2 - A^2/B; so
the best pair maximises A^2/B. As a falls from infinity, codes change only where x_i/a crosses a midpoint of the
codebook. A negative scale stands for the mirrored codebook: -8 .. 7 serves a block whose largest weight is positive as
well as one whose is negative, at no cost. For a codebook that is its own mirror image a >= 0.

Source: Carreira-Perpinan & Idelbayev, arXiv 1707.04319, section 4.2; free scale: Idelbayev et al., CVPR 2021.
"""

import dataclasses
import math
from typing import Any

import numpy as np
from jaxtyping import Array

from lcq.forms import Codes
from lcq.forms.base import Form
from lcq.forms.blocks import Per
from lcq.schemes.base import SCHEMES, Quantizer
from lcq.schemes.exact_scale import exact_scales
from lcq.schemes.grouped import cut
from lcq.schemes.nearest import nearest, nearest_scaled
from lcq.schemes.scale_search import search_scale
from lcq.schemes.scales import as_scale, check_float16, check_scale_dtype, scale_format


@SCHEMES.register("Levels")
@dataclasses.dataclass(frozen=True)
class Levels(Quantizer):
    """Projection on a fixed codebook, Delta = a c_k with c in `values`.

    A tie between two levels goes to the one nearer to zero, but away from zero itself, and at zero to the positive one:
    so sign(0) = +1, and |x| = 1/2 is not zero in {-1, 0, 1}.

    Attributes:
        values: The codebook c, at most 65,536 distinct finite numbers.
        scale: Whether codes are scaled: False for a = 1; True for the scale a that minimises the error, by a search
            over 64 scales of either sign (on at most 32,768 of a block's elements, on all if they have an importance)
            and twice 16 around the best of them, each judged after its codes have got their best scale: sort-free,
            jit-able, and global up to the resolution of the search. Negative only if that is better, and never where
            the values are symmetric around 0.
        per: What shares one scale, see `lcq.forms.blocks.block_counts`.
        scale_dtype: Format of scales, in which they are chosen: "float32", "bfloat16" or "float16". None for bfloat16
            in groups (per=32), as 32 bits for each group are a bit a weight, and float32 elsewhere. bfloat16 has the
            range of float32, and the codes make up for its 8 bits. float16 holds 6.1e-5 to 65,504 in full: leaves that
            need other scales are refused, and smaller scales of single blocks lose bits.
        exact: Whether to find the globally optimal scale by a sweep over all breakpoints in float64, O(N K log(N K)),
            on the host.

    Raises:
        ValueError: no values, too many, or values that are not finite; `per` or `exact` without `scale`.

    Example:
        >>> import jax.numpy as jnp
        >>> form = Levels((-1, 0, 1), scale=True).project(jnp.array([0.1, -2.0, 4.0, 0.0, 3.0]))
        >>> form.dense()
        Array([ 0., -3.,  3.,  0.,  3.], dtype=float32)
    """

    values: tuple[float, ...]
    scale: bool = False
    per: Per = None
    exact: bool = False
    scale_dtype: str | None = None

    def __post_init__(self) -> None:
        values = tuple(sorted({float(np.float32(v)) for v in self.values}))
        if not 1 <= len(values) <= 65536 or not all(math.isfinite(v) for v in values):
            raise ValueError(f"expected 1 to 65,536 finite levels, got {self.values!r}")
        if not self.scale and (self.exact or self.per is not None or self.scale_dtype is not None):
            raise ValueError("per=, exact= and scale_dtype= choose a scale: pass scale=True with them")
        check_scale_dtype(self.scale_dtype)
        if self.scale and not any(values):
            raise ValueError("expected a level other than zero to scale, got zeros")
        object.__setattr__(self, "values", values)

    @property
    def host(self) -> bool:
        return self.exact

    def check_numbers(self, x: Array) -> None:
        if self.scale and self.scale_dtype == "float16":
            check_float16(x, max(map(abs, self.values)))

    def solve(self, xs: tuple[Array, ...], previous: Any, mu: Any, importance: Any = None) -> tuple[Form, ...]:
        del mu
        whole = cut(xs, self.per, importance)
        if not self.scale:
            return tuple(self._form(x, nearest(w, self.values), None) for x, w in zip(xs, whole.leaves, strict=True))
        dtype = scale_format(self.per, self.scale_dtype)
        if self.exact:
            a = exact_scales(whole, self.values, dtype)
        else:
            a = search_scale(whole, self.values, None if previous is None else previous[0].scale, dtype)
        leaves = zip(xs, whole.leaves, whole.spread(a), whole.numbers(as_scale(a, dtype)), strict=True)
        return tuple(self._form(x, nearest_scaled(w, self.values, here), scale) for x, w, here, scale in leaves)

    def _form(self, x: Array, codes: Array, scale: Array | None) -> Codes:
        return Codes(codes.reshape(x.shape), scale=scale, values=self.values, dtype=str(x.dtype))


@SCHEMES.register("Binary")
@dataclasses.dataclass(frozen=True)
class Binary(Levels):
    """{-a, a} with a = mean |x|, or {-1, 1}: Delta = a sign(x), sign(0) = +1.

    Attributes:
        values: -1 and 1.
        scale: whether a is free; else it is 1.
        per: what shares one scale, as in `Levels`; likewise `scale_dtype`.

    Source: Rastegari et al., arXiv 1603.05279; arXiv 1707.04319, section 4.2.

    Example:
        >>> import jax.numpy as jnp
        >>> Binary().project(jnp.array([-1.0, 2.0, 3.0])).dense()
        Array([-2.,  2.,  2.], dtype=float32)
    """

    values: tuple[float, ...] = dataclasses.field(default=(-1.0, 1.0), init=False, repr=False)
    scale: bool = True
    exact: bool = dataclasses.field(default=False, init=False, repr=False)


@SCHEMES.register("Ternary")
@dataclasses.dataclass(frozen=True)
class Ternary(Levels):
    """{-a, 0, a} with the best a: the mean of the j largest |x|, j = argmax (their sum)/sqrt(j); or {-1, 0, 1}.

    Attributes:
        values: -1, 0 and 1.
        scale: whether a is free; else it is 1.
        per: what shares one scale, as in `Levels`; likewise `scale_dtype`.

    Source: arXiv 1707.04319, section 4.2 and theorem A.3.

    Example:
        >>> import jax.numpy as jnp
        >>> Ternary().project(jnp.array([0.1, -2.0, 4.0])).dense()
        Array([ 0., -3.,  3.], dtype=float32)
    """

    values: tuple[float, ...] = dataclasses.field(default=(-1.0, 0.0, 1.0), init=False, repr=False)
    scale: bool = True
    exact: bool = dataclasses.field(default=False, init=False, repr=False)


@SCHEMES.register("PowersOfTwo")
@dataclasses.dataclass(frozen=True, init=False)
class PowersOfTwo(Levels):
    """{0, +-1, +-1/2, .., +-2^-c}: products become shifts.

    Attributes:
        c: the smallest power, 0 to 126.
        scale: whether a common factor is free.
        per: what shares the factor.
        scale_dtype: its format, see `Levels`.

    Raises:
        ValueError: another smallest power.

    Source: arXiv 1707.04319, section 4.2 and theorem A.1.

    Example:
        >>> import jax.numpy as jnp
        >>> PowersOfTwo(1).project(jnp.array([0.1, -0.6, 4.0])).dense()
        Array([ 0. , -0.5,  1. ], dtype=float32)
    """

    values: tuple[float, ...] = dataclasses.field(init=False, repr=False)
    exact: bool = dataclasses.field(default=False, init=False, repr=False)
    c: int = dataclasses.field(kw_only=True)

    def __init__(self, c: int, scale: bool = False, per: Per = None, scale_dtype: str | None = None) -> None:
        if not 0 <= c <= 126:
            raise ValueError(f"expected 0 <= c <= 126, got {c}")
        object.__setattr__(self, "c", c)
        powers = [2.0**-i for i in range(c + 1)]
        super().__init__((*(-p for p in powers), 0.0, *powers), scale=scale, per=per, scale_dtype=scale_dtype)
