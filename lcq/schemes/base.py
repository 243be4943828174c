"""`Scheme`: how arrays become forms."""

import abc
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array

from lcq.forms.axes import block_lengths
from lcq.forms.base import Form
from lcq.forms.blocks import Per, block_counts, compute_dtype
from lcq.forms.dtypes import native, own_promotion
from lcq.forms.registry import Registry

Scalar = Array | float

Earlier = tuple[Form, ...] | None
"""Forms of an earlier C step on the same leaves, to start from; None at a cold start."""

Importance = tuple[Array, ...] | None
"""h of each array, as `check_importance` returns it; None where all are one."""


class Scheme(abc.ABC):
    """How arrays become forms: the C step Pi(x) = argmin_Theta sum_i h_i (x_i - Delta_i(Theta))^2 + (2/mu) C(Theta).

    The importance h is one unless it is given. Subclasses are frozen dataclasses whose settings are hashable, so that a
    scheme can be static under jit.

    Attributes:
        leaf_arrays: Largest number of leaf-shaped arrays (`leafwise()` fields) in its working forms.
        host: Whether `solve` needs concrete arrays (an exact solver in float64 outside of any trace).
        costly: Whether C(Theta) is not zero; then `mu` is required, and there is no direct compression.
    """

    @property
    def leaf_arrays(self) -> int:
        return 1

    @property
    def host(self) -> bool:
        return False

    @property
    def costly(self) -> bool:
        return False

    @functools.partial(jax.jit, static_argnums=0)
    def _compiled(
        self, xs: tuple[Array, ...], previous: Earlier, mu: Scalar | None, *importance: Importance
    ) -> tuple[Form, ...]:
        """`solve`, compiled once for all leaves of equal shapes."""
        return self.solve(xs, previous, mu, *importance)

    @abc.abstractmethod
    def check(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError if a leaf of this shape cannot be projected."""

    def check_numbers(self, x: Array) -> None:
        """Raises ValueError if a concrete leaf cannot be projected for what its numbers are."""
        del x

    @abc.abstractmethod
    def solve(
        self,
        xs: tuple[Array, ...],
        previous: Earlier,
        mu: Scalar | None,
        importance: Importance = None,
    ) -> tuple[Form, ...]:
        """The C step for arrays that share one Theta; `previous` is a warm start of the same structure.

        `importance` is as `check_importance` returns it; it is passed only if a caller has given it.
        """

    @property
    def cuts(self) -> tuple[Per, ...]:
        """What of its settings cuts a leaf into blocks along its axes."""
        return ()

    def oriented(self, layout: str, rank: int) -> "Scheme":
        """This scheme for leaves of `rank` axes with another layout, see `lcq.forms.axes`.

        Raises:
            ValueError: a layout for which it has no projection.
        """
        del layout, rank
        return self

    def cost(self, forms: tuple[Form, ...]) -> Scalar:
        """C(Theta); zero for schemes that are constraints."""
        del forms
        return 0.0

    def charge(self, forms: tuple[Form, ...], mu: Scalar | None) -> Scalar:
        """What is paid beside the distance, in its units, so that the C step minimises both: (2/mu) C(Theta).

        It may be infinite for what the scheme does not allow, such as forms of an earlier run with other settings."""
        if not self.costly:
            return 0.0
        assert mu is not None
        return 2 * self.cost(forms) / mu

    @own_promotion()
    def project(self, x: Any, previous: Any = None, *, mu: ArrayLike | None = None, importance: Any = None) -> Any:
        """Projects an array, or several arrays onto one shared Theta.

            Pi(x) = argmin_Theta sum_i h_i (x_i - Delta_i(Theta))^2 + (2/mu) C(Theta)

        Args:
            x: a floating-point array, or a tuple of such arrays that share one codebook or budget.
            previous: an earlier result for the same shapes, as a warm start.
            mu: the penalty weight; needed by schemes with a cost, ignored by others.
            importance: h >= 0, an array that broadcasts against x, or a tuple of them for a tuple; None for ones. For
                instance h of shape (inputs, 1), the mean square of every input of a layer, for the error that its
                outputs make. Only ratios within a block that shares a codebook matter (with a price too, as in
                `KMeans(rate=)`, their size); a block whose h are all zero counts as unweighted, and so do schemes that
                choose nothing but the nearest number.

        Returns:
            A form in the working layout for an array; a tuple of forms for a tuple.

        Raises:
            ValueError: a shape, dtype or setting that has no projection; an importance that is negative, not finite, or
                does not broadcast.
        """
        single = not isinstance(x, tuple)
        xs = tuple(map(native, (x,) if single else x))
        if previous is not None and single:
            previous = (previous,)
        if self.costly and mu is None:
            raise ValueError(f"{self} has a cost: pass mu=, the weight of the distance it is traded against")
        for array in xs:
            if not jnp.issubdtype(array.dtype, jnp.floating):
                raise ValueError(f"expected a floating-point array, got {array.dtype}{list(array.shape)}")
            if array.size == 0:
                raise ValueError(f"expected at least one weight, got {array.dtype}{list(array.shape)}")
            self.check(array.shape)
            if not isinstance(array, jax.core.Tracer):
                self.check_numbers(jnp.asarray(array))
            if self.host and isinstance(array, jax.core.Tracer):
                raise ValueError(
                    f"{self} is solved on the host and cannot run under jit; call it on concrete arrays "
                    "(lcq.compress, or lcq.lc(every=None) with lcq.training.c_step), or choose exact=False"
                )
        given: tuple[Any, ...] = ()
        if importance is not None:
            given = (check_importance(xs, (importance,) if single else importance),)
            if self.host and any(isinstance(h, jax.core.Tracer) for h in given[0]):
                raise ValueError(f"{self} is solved on the host: expected a concrete importance, got a traced one")
        if not self.host:  # one program for what is one array, whether its dtype was said or came of a Python number
            xs = tuple(x if isinstance(x, jax.core.Tracer) else jnp.asarray(x, x.dtype) for x in xs)
        weight: Any = None  # others ignore it
        if self.costly:
            weight = mu if isinstance(mu, float | int | Array) else jnp.asarray(mu)
        forms = (self.solve if self.host else self._compiled)(xs, previous, weight, *given)
        if not isinstance(forms, tuple) or len(forms) != len(xs) or not all(isinstance(form, Form) for form in forms):
            got = ", ".join(type(form).__name__ for form in forms) if isinstance(forms, tuple) else type(forms).__name__
            raise ValueError(
                f"expected {type(self).__name__}.solve to return a tuple of forms, one for each of xs, got {got}"
            )
        return forms[0] if single else forms


SCHEMES: Registry[type[Scheme]] = Registry("schemes")
"""Schemes by the name of their class, as texts and plans have them; any other scheme works, but has no text."""


class Quantizer(Scheme):
    """A scheme whose forms are `Codes`: every element is an index into a codebook, one for each block of the leaf.

    Attributes:
        per: What shares one codebook or scale, see `lcq.forms.blocks.block_counts`.
    """

    per: Per

    def check(self, shape: tuple[int, ...]) -> None:
        block_counts(self.per, shape)

    @property
    def cuts(self) -> tuple[Per, ...]:
        return (self.per,)

    def oriented(self, layout: str, rank: int) -> "Scheme":
        same: Any = self  # a dataclass, as all schemes are
        if self.per is None:
            return self
        changes: dict[str, Any] = {"per": block_lengths(self.per, layout, rank)}
        own = getattr(same, "scale_bits", None) is None
        if isinstance(self.per, int) and own and getattr(same, "scale_dtype", "") is None:
            changes["scale_dtype"] = "bfloat16"  # what None means in groups, which lengths no longer tell
        return dataclasses.replace(same, **changes)


@own_promotion()
def check_importance(xs: Sequence[Any], importance: Any) -> tuple[Any, ...]:
    """The importance of each element, one array for each of `xs`, with as many axes as that, in float32 or wider; ones
    where all are zero.

    Raises:
        ValueError: not one real array each that broadcasts against its leaf; negative, not finite, or above 2^126,
            which is seen of concrete arrays only.
    """
    if not isinstance(importance, tuple) or len(importance) != len(xs):
        got = f"{len(importance)} of them" if isinstance(importance, tuple) else type(importance).__name__
        raise ValueError(f"importance: expected a tuple of {len(xs)} arrays, got {got}; pass one for each array of x")
    importance = tuple(map(native, importance))
    for h, x in zip(importance, xs, strict=True):
        if not hasattr(h, "dtype") or not any(jnp.issubdtype(h.dtype, t) for t in (jnp.floating, jnp.integer, bool)):
            got = str(h.dtype) if hasattr(h, "dtype") else type(h).__name__
            raise ValueError(f"importance: expected an array of real numbers, got {got}; convert it with jnp.asarray")
        if h.ndim > x.ndim or any(n not in (1, m) for n, m in zip(h.shape[::-1], x.shape[::-1], strict=False)):
            raise ValueError(
                f"importance: expected a shape that broadcasts to {list(x.shape)}, got {list(h.shape)}; "
                "one number for each row of a matrix has the shape (rows, 1)"
            )
        if not isinstance(h, jax.core.Tracer):
            with jax.ensure_compile_time_eval():
                low, high = map(float, _extremes(h) if isinstance(h, Array) else (h.min(), h.max()))
            if not (low >= 0 and high <= 2.0**126):  # of more, XLA flushes the reciprocal to zero
                raise ValueError(
                    f"importance: expected finite numbers >= 0, at most 8.5e37, got some from {low} to {high} "
                    f"in {h.dtype}{list(h.shape)}; clip them, or look where they come from"
                )
    return _weights(importance, tuple((compute_dtype(x.dtype), x.ndim) for x in xs))


@jax.jit
def _extremes(h: Array) -> tuple[Array, Array]:
    return h.min(), h.max()


@functools.partial(jax.jit, static_argnums=1, inline=True)
def _weights(importance: tuple[Array, ...], like: tuple[tuple[Any, int], ...]) -> tuple[Array, ...]:
    """Ones where all are zero; in the dtypes, and with as many axes, as are given."""
    some = functools.reduce(jnp.logical_or, [jnp.any(h > 0) for h in importance])
    return tuple(
        jnp.where(some, h, 1).astype(dtype).reshape((1,) * (ndim - h.ndim) + h.shape)
        for h, (dtype, ndim) in zip(importance, like, strict=True)
    )
