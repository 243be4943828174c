"""The formats of scales: as few bits as they need, and chosen among the numbers that a format has."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lcq.forms.blocks import Per, compute_dtype
from lcq.forms.dtypes import nearest_number


def scale_format(per: Per, given: str | None) -> str | None:
    """The format of scales: bfloat16 in groups unless another is given; None is that of sums over the leaf."""
    if given is None and isinstance(per, int):
        return "bfloat16"
    return given


def check_scale_dtype(given: Any) -> None:
    """Raises ValueError unless scales can be in this format."""
    if given not in (None, "float32", "bfloat16", "float16"):
        raise ValueError(f"scale_dtype: expected 'float32', 'bfloat16', 'float16' or None, got {given!r}")


def check_float16(x: Array, reach: float) -> None:
    """Raises ValueError if the scale max |x| / reach of a leaf's largest block is none that float16 holds in full."""
    with jax.ensure_compile_time_eval():
        high = float(jnp.max(jnp.abs(x.astype(compute_dtype(x.dtype))))) / reach
    kind = np.finfo(np.float16)
    if high and not float(kind.tiny) <= high <= float(kind.max):
        raise ValueError(
            f"expected weights whose scales fit float16, from {kind.tiny:.2g} to {kind.max:.0f}, got one of about "
            f"{high:.2g}; take scale_dtype='bfloat16', which has the range of float32"
        )


def rounded_scale(a: Array, dtype: str | None) -> Array:
    """Scales with as many bits as a format has, in the dtype that they had. XLA may leave out a cast and back."""
    if dtype is None or np.dtype(a.dtype).itemsize <= jnp.dtype(dtype).itemsize:
        return a
    whole, kind = jnp.finfo(a.dtype), jnp.finfo(jnp.dtype(dtype))
    return jax.lax.reduce_precision(a, int(whole.nexp), int(kind.nmant))


def as_scale(a: Array, dtype: str | None) -> Array:
    """Scales as a form stores them: the nearest finite numbers of a format; None for the dtype that they have."""
    return a if dtype is None else nearest_number(rounded_scale(a, dtype), dtype)


def power_of_two(a: Array) -> Array:
    """A power of two that is at most a, and more than half of it; within the range of which the inverse is one too."""
    exponent = jnp.clip(jnp.frexp(a)[1] - 1, -125, 125)
    return jnp.ldexp(jnp.ones_like(a), exponent)
