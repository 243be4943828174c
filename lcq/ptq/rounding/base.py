"""GPFQ and its family on statistics: which level each weight gets, so that the product changes least.

Neurons are the columns of w [N, n]; inputs t = 1..N are rounded one after another, each with regard to the errors
e = w - q before it. All methods are one recursion,

    z_t = b_t + (1/F_tt) sum_{s<t} F_ts (v_s - q_s),    q_t = Q(z_t),

    GPFQ      F = H                            v = w                                      b = w + tril(D) w / diag(H)
    GPTQ      F = R', R R' = H + delta I       v = w                                      b = v
    Qronos    F = R' of H without input 1,     v = w + (H_22 + delta I)^{-1} (D w)_2      b = v,
              F_21 = R^{-1} H_21               v_1 = w_1                                  b_1 = w_1 + (D w)_1 / H_11

with R upper triangular, delta the damping, and H, D of `lcq.ptq.statistics`. GPFQ's minimises
||X w_{<=t} - Y q_{<=t}|| over q_t. That of GPTQ is commonly written as w_{>t} -= (z_t - q_t) L_{>t,t} / L_tt with
L = R^{-T}: then L diag(L)^{-1} (z - q) = w - q, so no inverse is needed. Qronos rounds input 1, re-solves the rest by
least squares, and goes on as GPTQ.

A column of H with H_tt <= 1e-10 max H_ss is dead: its weights go to the nearest level.

Source: Lybrand & Saab, arXiv 2010.15979; Zhang, Zhou & Saab, arXiv 2201.11113; SPFQ: arXiv 2309.10975; GPTQ: arXiv
2210.17323; Qronos: arXiv 2505.11695. The recursions on H and D are lcq's.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lcq.forms import Trellis
from lcq.forms.blocks import compute_dtype
from lcq.forms.dtypes import wider
from lcq.forms.registry import Registry
from lcq.ptq.rounding.coded import Coded
from lcq.ptq.rounding.sequential import alive, by_norm, dot
from lcq.ptq.statistics import Statistics, column_sums


@dataclasses.dataclass(frozen=True)
class Rounding(abc.ABC):
    """A way to choose the codes of weights w [N, n]; final subclasses have hashable settings, static under jit.

    What `lcq.quantize` does around every method is set here, for `codes` it does not count:

    Attributes:
        search: Whether the scale is searched by the exact residual; else the scheme's own is kept.
        shrink: By which part, 0 to 1, the products of two different inputs in H and D are made smaller; 0 as the papers
            have it; None to choose it on rows held back, and the change of a bias then leaves out the part that is
            noise.

    Raises:
        ValueError: shrink out of range.
    """

    search: bool = dataclasses.field(default=True, kw_only=True)
    shrink: float | None = dataclasses.field(default=None, kw_only=True)
    tries: ClassVar[int] = 5
    """How many scales are tried on all of many neurons, one less than twice that with few inputs, see
    `lcq.ptq.scale_search`."""
    independent: ClassVar[bool] = False
    """Whether every weight is rounded for itself."""

    def __post_init__(self) -> None:
        if self.shrink is not None and not 0 <= self.shrink <= 1:
            raise ValueError(f"expected shrink between 0 and 1, or None to choose it, got {self.shrink}")

    def __str__(self) -> str:
        """The method with those of its settings that are not as usual."""
        given = []
        for field in dataclasses.fields(self):
            usual = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            value = getattr(self, field.name)
            if field.init and value != usual:
                given.append(f"{field.name}={value if isinstance(value, Rounding) else repr(value)}")
        return f"{type(self).__name__}({', '.join(given)})"

    def codes(self, w: Float[Array, "N n"], statistics: Statistics, form: Coded, key: Array | None = None) -> Coded:
        """Chooses codes for the codebook of a form.

        Args:
            w: weights, a column for each neuron.
            statistics: of the product's N inputs.
            form: of w, in the working layout: its levels and scales are the codebook, its codes do not count.
            key: a random key, for methods that draw.

        Returns:
            The form with new codes, and with a new table if the method has its own.

        Raises:
            ValueError: no key where one is needed, a codebook that the method cannot use, or statistics that it cannot
                factorise; inside a transformation, where nothing can be looked at, these give the nearest levels.

        Example:
            >>> from lcq.ptq.statistics import gather, finish
            >>> from lcq.ptq.rounding.gpfq import GPFQ
            >>> from lcq.schemes.levels import Levels
            >>> w, y = jnp.array([[0.4], [0.4]]), jnp.array([[1.0, 1.0], [2.0, 2.0]])
            >>> form = Levels((0, 1)).project(w)
            >>> GPFQ().codes(w, finish(gather(y)), form).dense()
            Array([[0.],
                   [1.]], dtype=float32)
        """
        method = self.on_paths() if isinstance(form, Trellis) else self
        chosen, damping = solved(method, w, statistics, form, key)
        if damping is not None and not isinstance(damping, jax.core.Tracer) and not jnp.isfinite(damping):
            raise ValueError(
                f"expected H + delta I with a root, got none with {self}: "
                "raise damping=, or max_damping= up to which it may grow by itself"
            )
        return chosen

    @abc.abstractmethod
    def prepare(self, w: Float[Array, "N n"], statistics: Statistics) -> Any:
        """What does not depend on the codebook, computed once for many."""

    @abc.abstractmethod
    def solve(self, prepared: Any, form: Any, key: Array | None = None) -> Any:
        """`codes`, from what `prepare` gave; of methods that `on_paths` gives, of paths too."""

    def on_paths(self) -> "Rounding":
        """The method that stands for this one where codes are steps of paths, as those of a `Trellis`.

        Raises:
            ValueError: there is none.
        """
        raise ValueError(
            f"expected a method that rounds a trellis, got {self}, which takes one weight after another; "
            "pass 'descent', 'qronos', 'gptq', 'block_ldl' or 'rtn'"
        )

    def fits(self, form: Any) -> bool:
        """Whether it fits the scales of a form, so that none are searched."""
        del form
        return False

    def random_key(self, number: int) -> Array | None:
        """The random key for product `number` of a net; None for methods that draw nothing."""
        del number
        return None

    def damped(self, prepared: Any) -> Array | None:
        """The damping of H, in units of the mean of its diagonal, infinite if that failed; None without damping."""
        del prepared
        return None


ROUNDING_METHODS: Registry[Callable[..., Rounding]] = Registry(
    "rounding methods", "or pass one with settings of your own, such as lcq.GPFQ(act_order=True)"
)
"""Classes of rounding methods by name; called without settings they have their usual ones."""


@functools.partial(jax.jit, static_argnums=0)
def solved(
    method: Rounding, w: Array, statistics: Statistics, form: Coded, key: Array | None
) -> tuple[Coded, Array | None]:
    """The form with codes, and the damping that they took."""
    prepared = method.prepare(w, statistics)
    return method.solve(prepared, form, key), method.damped(prepared)


def residual(w: Float[Array, "N n"], statistics: Statistics, form: Coded) -> Float[Array, "n"]:
    """||X w - Y q||^2 = w'Kw + 2 e'Dw + e'He per neuron, e = w - q, without X and Y.

    Where K is None its term is left out: it is 0 if X is Y, and else the same for every q, so that differences between
    codebooks are right, and a value may be negative.
    """
    return _measure(w, statistics)(form)


def correction(
    w: Float[Array, "N n"], mean_x: Float[Array, "N"], mean_y: Float[Array, "N"], form: Coded
) -> Float[Array, "n"]:
    """What to add to the bias when statistics are centred: mean(X) w - mean(Y) q per neuron."""
    w = w.astype(mean_y.dtype)
    return dot(mean_x - mean_y, w) + dot(mean_y, w - form.dense().astype(w.dtype))


def wide(w: Array, statistics: Statistics) -> Array:
    return w.astype(wider(compute_dtype(w.dtype), statistics.gram.dtype))


def _measure(w: Array, statistics: Statistics) -> Callable[[Coded], Array]:
    """`residual` as a function of the form, the products with w made once."""
    w, drift, difference = wide(w, statistics), statistics.drift, statistics.difference
    fixed = 0 if difference is None else column_sums(w * dot(difference, w))
    slope = None if drift is None else 2 * dot(drift, w)

    def measure(form: Coded) -> Array:
        errors = w - form.dense().astype(w.dtype)
        moved = dot(statistics.gram, errors)
        return fixed + column_sums(errors * (moved if slope is None else moved + slope))

    return measure


def ordered(
    w: Array, statistics: Statistics, act_order: bool
) -> tuple[Array, Array, Array | None, Array | None, Array]:
    """(w, H, D, order, which columns are not dead), in the order of rounding."""
    w, gram, drift = wide(w, statistics), statistics.gram, statistics.drift
    if not act_order:
        return w, gram, drift, None, alive(jnp.diagonal(gram))
    by_size = by_norm(jnp.diagonal(gram))
    gram = gram[by_size][:, by_size]
    drift = None if drift is None else drift[by_size][:, by_size]
    return w[by_size], gram, drift, by_size, alive(jnp.diagonal(gram))
