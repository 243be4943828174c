"""Numbers as they are stored: the floating-point formats, the nearest number in one of them, and the order of bytes.

Casts of JAX and numpy turn what is beyond a format's range into an infinity, or into NaN where it has none: 500 becomes
NaN in float8_e4m3fn, whose largest number is 448. Here it becomes the nearest number there is.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

FORMATS = (
    "float64",
    "float32",
    "bfloat16",
    "float16",
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3",
    "float8_e3m4",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
    "float8_e4m3b11fnuz",
    "float8_e8m0fnu",
    "float4_e2m1fn",
)
"""Names of the floating-point formats that JAX computes with on every device."""


def format_name(given: Any, what: str = "format", other: str = "") -> str:
    """The name of a floating-point format, which `given` says by its name or as a dtype.

    Args:
        given: such as "bfloat16" or jnp.bfloat16.
        what: what it is given for, in the error.
        other: what else may stand there, in the error.

    Raises:
        ValueError: no format, or none that there is; names those that there are.

    Example:
        >>> format_name(jnp.bfloat16)
        'bfloat16'
    """
    try:
        name = given if given in FORMATS else jnp.dtype(given).name
    except (TypeError, ValueError):
        name = None
    if name not in FORMATS:
        known = ", ".join(FORMATS) + (f", or {other}" if other else "")
        raise ValueError(f"{what}: expected a floating-point format, one of {known}, got {given!r}")
    return name


def nearest_number(x: Any, dtype: DTypeLike) -> Array:
    """The nearest finite number in a format, the even one on ties: argmin_{y in dtype} |x - y|.

    What is not finite stays so where the format has it.

    Args:
        x: floating-point numbers of any shape and format.
        dtype: of the result.

    Returns:
        An array of the same shape.

    Example:
        >>> nearest_number(jnp.array([500.0, -0.1, 3.3]), "float8_e4m3fn").astype(jnp.float32)
        Array([ 4.480000e+02, -1.015625e-01,  3.250000e+00], dtype=float32)
    """
    x, dtype = jnp.asarray(x), jnp.dtype(dtype)
    if x.dtype == dtype or not all(jnp.issubdtype(d, jnp.floating) for d in (x.dtype, dtype)):
        return x.astype(dtype)
    if dtype.itemsize >= 4 and dtype.itemsize >= x.dtype.itemsize:
        return x.astype(dtype)
    x = x.astype(wider(x.dtype, jnp.float32))
    kind = jnp.finfo(dtype)
    low, high = (jnp.asarray(float(bound), x.dtype) for bound in (kind.min, kind.max))
    inside = jnp.where(jnp.isfinite(x), jnp.clip(x, low, high), x)
    if dtype.name.endswith("fnuz"):  # XLA makes -0 of what is just below zero, and that is their NaN
        inside = jnp.where(jnp.abs(inside) > float(kind.smallest_subnormal) / 2, inside, jnp.abs(inside) * 0)
    if kind.bits < 8:  # XLA rounds twice on the way to so few
        power = jnp.maximum(jnp.frexp(inside)[1] - 1, int(kind.minexp)) - int(kind.nmant)
        step = jnp.ldexp(jnp.ones_like(inside), power)
        inside = jnp.round(inside / step) * step
    y = inside.astype(dtype)
    if float(kind.min) > 0:  # and its least number is one that XLA takes for zero
        least = jax.lax.bitcast_convert_type(jnp.zeros(y.shape, jnp.uint8), dtype)
        y = jnp.where(inside < float(jnp.finfo(jnp.float32).tiny), least, y)
    return y


def wider(*dtypes: DTypeLike) -> Any:
    """The narrowest floating-point or complex dtype that holds the numbers of all; of two shorter ones float32.

    Unlike `jnp.promote_types` it knows float8, and does not depend on `jax_numpy_dtype_promotion`.

    Example:
        >>> str(wider(jnp.float8_e4m3fn, jnp.float32)), str(wider(jnp.int32, jnp.bfloat16))
        ('float32', 'bfloat16')
    """
    whole = [np.dtype(dtype) for dtype in dtypes]
    inexact = list(dict.fromkeys(dtype for dtype in whole if jnp.issubdtype(dtype, jnp.inexact))) or [jnp.float32]
    if len(inexact) == 1:
        return np.dtype(inexact[0])
    long = any(dtype in (np.dtype(np.float64), np.dtype(np.complex128)) for dtype in inexact)
    if any(jnp.issubdtype(dtype, jnp.complexfloating) for dtype in inexact):
        return np.dtype(np.complex128 if long else np.complex64)
    return np.dtype(np.float64 if long else np.float32)


def native(leaf: Any) -> Any:
    """The same array with its bytes in this machine's order, which is the only one that JAX reads; others as they are.

    Example:
        >>> native(np.array([1, 2], ">i2"))
        array([1, 2], dtype=int16)
    """
    if isinstance(leaf, np.ndarray | np.generic) and not leaf.dtype.isnative:
        return leaf.astype(leaf.dtype.newbyteorder("="))
    return leaf


def native_tree(tree: PyTree) -> Any:
    """A tree whose numpy arrays are `native`."""
    return jax.tree.map(native, tree)


@contextlib.contextmanager
def own_promotion() -> Iterator[None]:
    """JAX's standard promotion of ranks and dtypes inside, whatever the user has set; also as `@own_promotion()`.

    lcq's arithmetic is written for it. `jax_numpy_rank_promotion` and `jax_numpy_dtype_promotion` are there to find
    mistakes in the user's code, and go on to hold for that.

    Example:
        >>> with jax.numpy_rank_promotion("raise"), own_promotion():
        ...     jnp.ones((2, 2)) + jnp.ones(2)
        Array([[2., 2.],
               [2., 2.]], dtype=float32)
    """
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield
