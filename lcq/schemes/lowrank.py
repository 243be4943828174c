"""Low rank: a matrix of a given rank, or of the rank that is worth its cost.

    rank      Pi(X) = argmin ||X - L R||_F^2  s.t.  L R has rank r: the first r terms U S V' of the SVD, split as
              L = U S^1/2, R = S^1/2 V'
    penalty   r = argmin_r alpha C(r) + mu/2 sum_{i > r} s_i^2,   C(r) = unit min(r (m + n), m n)

The second is exact: all ranks are looked at. A rank so high that factors would be no smaller than the matrix costs what
the matrix does, and is stored as the matrix.

Source: Eckart & Young 1936; Idelbayev & Carreira-Perpinan, "Low-rank compression of neural nets: learning the rank of
each layer", CVPR 2020.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lcq.forms import Factors
from lcq.forms.axes import outputs_last
from lcq.forms.base import Form
from lcq.forms.blocks import compute_dtype, explicit_sharding
from lcq.forms.factors import as_matrix, check_matrix_shape, matrix_shape
from lcq.schemes.base import SCHEMES, Earlier, Importance, Scalar, Scheme


@SCHEMES.register("LowRank")
@dataclasses.dataclass(frozen=True)
class LowRank(Scheme):
    """Projection on matrices of low rank, by the singular value decomposition.

    A leaf is seen as a matrix: its last axis are the columns, all others the rows; so a convolution's kernel
    (kh, kw, cin, cout) of rank r is one to r channels and one of 1 x 1. If `separable`, rows are (kh, cin) and columns
    (kw, cout): a column of kh x 1 and a row of 1 x kw. Leaves of a joint task are projected one by one.

    Weights h may differ from row to row, as those of a layer's inputs do, and no more: others have no closed form.

    Attributes:
        rank: Rank of the result, at most that of the matrix.
        penalty: Price alpha of the rank, instead of a rank; then `mu` is needed, and of equally good ranks the smallest
            is taken.
        unit: Cost of one stored number in C(r): 32 bits; or, for the cost in floating-point operations, those of the
            layer (see `lcq.tracing.flops`) over its number of weights, in a rule for each layer.
        separable: Whether to factor the other matrix of a convolution's kernel, whose factors are separable filters.

    Raises:
        ValueError: neither or both of rank and penalty, or one out of range.

    Example:
        >>> x = jnp.array([[2.0, 0.0], [0.0, 1.0]])
        >>> LowRank(1).project(x).dense().round(3)
        Array([[2., 0.],
               [0., 0.]], dtype=float32)
    """

    rank: int | None = None
    penalty: float | None = None
    unit: float = 32.0
    separable: bool = False

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.penalty is None):
            raise ValueError(f"expected either rank= or penalty=, got {self.rank!r} and {self.penalty!r}")
        if self.rank is not None and (isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 0):
            raise ValueError(f"expected rank= an int >= 0, got {self.rank!r}")
        for name in ("penalty", "unit"):
            if (amount := getattr(self, name)) is not None and not 0 <= amount < math.inf:
                raise ValueError(f"expected {name} >= 0 and finite, got {amount!r}")

    @property
    def leaf_arrays(self) -> int:
        return 0

    @property
    def costly(self) -> bool:
        return self.penalty is not None

    def check(self, shape: tuple[int, ...]) -> None:
        check_matrix_shape(shape, self.separable)

    def oriented(self, layout: str, rank: int) -> Scheme:
        if rank > 2 and not outputs_last(layout, rank):
            raise ValueError(
                f"{self} wants one axis of outputs, the last, got layout={layout!r} and {rank} axes; "
                "transpose or reshape the leaf before"
            )
        return self

    def solve(
        self, xs: tuple[Array, ...], previous: Earlier, mu: Scalar | None, importance: Importance = None
    ) -> tuple[Form, ...]:
        del previous
        hs = (None,) * len(xs) if importance is None else importance
        return tuple(self._factors(x, h, mu) for x, h in zip(xs, hs, strict=True))

    def cost(self, forms: tuple[Form, ...]) -> Scalar:
        """alpha C(r), summed over the leaves."""
        total: Scalar = 0.0
        for form in forms:
            assert isinstance(form, Factors)
            if self.penalty is not None:
                total = total + self.penalty * self._numbers(form.tail, form.rank)
        return total

    def _numbers(self, shape: tuple[int, ...], rank: Array | int | None) -> Array:
        """C(r) = unit min(r (m + n), m n)."""
        m, n = matrix_shape(shape, self.separable)
        return self.unit * jnp.minimum(jnp.asarray(rank, jnp.float32) * (m + n), float(m) * n)

    def _factors(self, x: Array, h: Array | None, mu: Scalar | None) -> Factors:
        if explicit_sharding(x) is not None:
            x = jax.sharding.reshard(x, jax.P(*(None,) * x.ndim))  # every device does the whole decomposition
        matrix = as_matrix(x.astype(compute_dtype(x.dtype)), self.separable)
        row = None if h is None else self._row_roots(h, x.shape)
        u, s, v = _svd(matrix if row is None else matrix * row)
        if row is not None:
            u = jnp.where(row > 0, u / jnp.where(row > 0, row, 1), 0)
        room = s.shape[0] if self.rank is None else min(self.rank, s.shape[0])
        rank = jnp.int32(room) if self.penalty is None else self._best_rank(s, x.shape, mu)
        roots = jnp.sqrt(jnp.where(jnp.arange(room) < rank, s[:room], 0))
        left, right = u[:, :room] * roots, roots[:, None] * v[:room]
        return Factors(left, x.shape, right, rank, separable=self.separable, dtype=str(x.dtype))

    def _best_rank(self, s: Float[Array, " r"], shape: tuple[int, ...], mu: Scalar | None) -> Array:
        """argmin_r (2/mu) alpha C(r) + sum_{i > r} s_i^2; the smallest of equally good ones."""
        assert self.penalty is not None and mu is not None
        unit = jnp.clip(s[0], (tiny := jnp.finfo(s.dtype).tiny), 1 / tiny)  # squares neither overflow nor vanish
        tails = jnp.concatenate([jnp.cumsum((s[::-1] / unit) ** 2)[::-1], jnp.zeros_like(s[:1])])
        ranks = jnp.arange(s.shape[0] + 1)
        price = 2 * self.penalty * self._numbers(shape, ranks) / mu * (1 / unit) * (1 / unit)
        return jnp.argmin(tails + jnp.where(ranks > 0, price, 0)).astype(jnp.int32)

    def _row_roots(self, h: Array, shape: tuple[int, ...]) -> Float[Array, "m 1"]:
        """sqrt(h) of every row of the matrix."""
        inside = (1, 3) if self.separable else (len(shape) - 1,)
        if any(h.shape[axis] != 1 for axis in inside):
            raise ValueError(
                f"expected an importance that is equal along a row of its matrix, got {list(h.shape)} for "
                f"{list(shape)}; pass one for each input, of shape (..., inputs, 1)"
            )
        whole = tuple(1 if axis in inside else n for axis, n in enumerate(shape))
        return jnp.sqrt(jnp.broadcast_to(h, whole).reshape(-1, 1))


def _svd(x: Float[Array, "m n"]) -> tuple[Float[Array, "m r"], Float[Array, " r"], Float[Array, "r n"]]:
    """x = u diag(s) v. LAPACK reads columns and is faster with many rows: x' lies as it wants, x would be copied."""
    if x.shape[0] > x.shape[1]:
        u, s, v = jnp.linalg.svd(x, full_matrices=False)
        return u, s, v
    v, s, u = jnp.linalg.svd(x.T, full_matrices=False)
    return u.T, s, v.T
