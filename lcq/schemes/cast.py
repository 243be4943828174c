"""Shorter floating-point formats, for the small leaves."""

import dataclasses

from jaxtyping import Array

from lcq import forms
from lcq.forms.base import Form
from lcq.forms.dtypes import format_name, nearest_number
from lcq.schemes.base import SCHEMES, Earlier, Importance, Scalar, Scheme


@SCHEMES.register("Cast")
@dataclasses.dataclass(frozen=True)
class Cast(Scheme):
    """Delta = x rounded to the nearest finite number of a shorter floating-point format, to the even one on ties.

    Attributes:
        format: Name of the stored dtype: "bfloat16", "float16", "float8_e4m3fn" or another of
            `lcq.forms.dtypes.FORMATS`.

    Raises:
        ValueError: no name of a floating-point format.

    Example:
        >>> import jax.numpy as jnp
        >>> Cast("bfloat16").project(jnp.array([1.0, 0.1])).dense()
        Array([1.        , 0.10009766], dtype=float32)
        >>> Cast("float8_e4m3fn").project(jnp.array([500.0, -0.5])).dense()
        Array([448. ,  -0.5], dtype=float32)
    """

    format: str = "bfloat16"

    def __post_init__(self) -> None:
        object.__setattr__(self, "format", format_name(self.format))

    def check(self, shape: tuple[int, ...]) -> None:
        del shape

    def solve(
        self, xs: tuple[Array, ...], previous: Earlier, mu: Scalar | None, importance: Importance = None
    ) -> tuple[Form, ...]:
        del previous, mu, importance  # the nearest number is the nearest one for any weight
        return tuple(forms.Cast(nearest_number(x, self.format), dtype=str(x.dtype)) for x in xs)
