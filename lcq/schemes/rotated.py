"""Another scheme in turned coordinates."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from lcq import forms
from lcq.forms.axes import checked_along, letters
from lcq.forms.base import Form, share
from lcq.forms.blocks import Per
from lcq.forms.meshes import by_compiler, explicit_mesh, placed_on, spec_of
from lcq.forms.rotation import check_length, turned
from lcq.schemes.base import SCHEMES, Earlier, Importance, Scalar, Scheme


@SCHEMES.register("Rotated")
@dataclasses.dataclass(frozen=True)
class Rotated(Scheme):
    """A scheme applied to weights that are turned along their inputs:

        Pi(x) = R Pi'(R'x)

    R is orthogonal, so this is the projection on what the scheme allows in the turned coordinates: there every weight
    is a sum of all inputs' weights, near a Gaussian, and no input stands out, neither of the weights nor of the
    activations. That helps where few inputs are large, at 2 and 3 bits most; weights that look Gaussian already gain
    nothing. Nothing of R is stored. A product turns its activations: [M, N] by N (p + q) M multiplications, p q = N.

    Attributes:
        scheme: The scheme.
        seed: Of the signs in R, 0 to 2^32 - 1.
        along: The axes of inputs, counted from the end; None for all but the last, and for those of a product in
            `lcq.quantize`.

    An importance is taken as its mean over the inputs, as in turned coordinates all of them have a part in each;
    weights of no importance are taken as zeros. Inside of `jax.shard_map` a device needs all inputs of its weights.

    Raises:
        ValueError: a setting out of range; a leaf with so many inputs that there is no R.

    Example:
        >>> import lcq
        >>> x = jnp.ones((64, 8)).at[3].set(16.0)
        >>> plain, rotated = lcq.Uniform(3, per="channel"), Rotated(lcq.Uniform(3, per="channel"))
        >>> [round(float(((scheme.project(x).dense() - x) ** 2).mean()), 1) for scheme in (plain, rotated)]
        [1.0, 0.1]

    Source: Ashkboos et al., QuaRot, arXiv 2404.00456; Tseng et al., QuIP#, arXiv 2402.04396.
    """

    scheme: Scheme
    seed: int = 0
    along: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.scheme, Scheme) or isinstance(self.scheme, Rotated):
            raise ValueError(f"expected a scheme that is not rotated itself, such as Trellis(2), got {self.scheme!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 1 << 32:
            raise ValueError(f"expected seed from 0 to 2^32 - 1, got {self.seed!r}")
        object.__setattr__(self, "along", checked_along(self.along))

    @property
    def leaf_arrays(self) -> int:
        return self.scheme.leaf_arrays

    @property
    def host(self) -> bool:
        return self.scheme.host

    @property
    def costly(self) -> bool:
        return self.scheme.costly

    @property
    def cuts(self) -> tuple[Per, ...]:
        return self.scheme.cuts

    def check(self, shape: tuple[int, ...]) -> None:
        if self.along is not None and -min(self.along) > len(shape):
            raise ValueError(f"along={self.along!r} needs at least {-min(self.along)} axes, got shape {shape}")
        self.scheme.check(shape)
        check_length(math.prod(shape[axis] for axis in self._axes(len(shape))))

    def check_numbers(self, x: Array) -> None:
        self.scheme.check_numbers(self._turned(x))

    def oriented(self, layout: str, rank: int) -> Scheme:
        along = tuple(i - rank for i, letter in enumerate(letters(layout, rank)) if letter != "o")
        return dataclasses.replace(self, scheme=self.scheme.oriented(layout, rank), along=self.along or along)

    def cost(self, forms: tuple[Form, ...]) -> Scalar:
        return self.scheme.cost(_inner(forms))

    def charge(self, forms: tuple[Form, ...], mu: Scalar | None) -> Scalar:
        return self.scheme.charge(_inner(forms), mu)

    def solve(
        self, xs: tuple[Array, ...], previous: Earlier, mu: Scalar | None, importance: Importance = None
    ) -> tuple[Form, ...]:
        given: Any = None if previous is None else tuple(share(form, None) for form in _inner(previous))
        rotated = xs
        if importance is not None:
            rotated = tuple(jnp.where(h > 0, x, 0) for h, x in zip(importance, xs, strict=True))
            importance = tuple(
                jnp.broadcast_to(h, x.shape).mean(self._axes(x.ndim), keepdims=True)
                for h, x in zip(importance, xs, strict=True)
            )
        found = self.scheme.project(tuple(map(self._turned, rotated)), given, mu=mu, importance=importance)
        return tuple(
            forms.Rotated(form, axes=self._axes(x.ndim), seed=self.seed, dtype=str(x.dtype))
            for form, x in zip(found, xs, strict=True)
        )

    def _axes(self, rank: int) -> tuple[int, ...]:
        return self.along or tuple(range(-rank, -1)) or tuple(range(-rank, 0))

    def _turned(self, x: Array) -> Array:
        mesh = explicit_mesh(x)
        onto = None if mesh is None else placed_on(mesh, spec_of(x))
        return by_compiler(lambda x: turned(x, self._axes(x.ndim), self.seed), onto, x)


def unrotated(scheme: Scheme | None) -> Scheme | None:
    """What a rotated scheme is in turned coordinates; others as they are."""
    return scheme.scheme if isinstance(scheme, Rotated) else scheme


def _inner(rotated: tuple[Form, ...]) -> tuple[Form, ...]:
    return tuple(form.inner for form in rotated if isinstance(form, forms.Rotated))
