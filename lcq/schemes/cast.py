"""Shorter floating-point formats, for the small leaves."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from lcq import forms
from lcq.base import Form, Scheme


@dataclasses.dataclass(frozen=True)
class Cast(Scheme):
    """Delta = x rounded to a shorter floating-point format, to nearest even.

    Attributes:
        format: name of the stored dtype: "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2" or "float32".

    Raises:
        ValueError: a dtype that is not floating-point.

    Example:
        >>> Cast("bfloat16").project(jnp.array([1.0, 0.1])).dense()
        Array([1.        , 0.10009766], dtype=float32)
    """

    format: str = "bfloat16"

    def __post_init__(self) -> None:
        name = jnp.dtype(self.format).name
        if not jnp.issubdtype(jnp.dtype(name), jnp.floating):
            raise ValueError(f"wanted a floating-point dtype such as 'bfloat16'; got {self.format!r}")
        object.__setattr__(self, "format", name)

    def check(self, shape: tuple[int, ...]) -> None:
        del shape

    def solve(self, xs: tuple[Array, ...], previous: Any, mu: Any, weights: Any = None) -> tuple[Form, ...]:
        del previous, mu, weights  # the nearest number is the nearest one for any weight
        return tuple(forms.Cast(x.astype(self.format), dtype=str(x.dtype)) for x in xs)
