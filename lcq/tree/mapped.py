"""A function of each layer of a stack: of all at once, or of one after another."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, PyTree

from lcq.forms.meshes import explicit_mesh, is_shared

_LARGE = 1 << 16
"""Numbers of a layer from which one after another takes no longer: XLA's loops over the numbers of a layer are fast as
they are written, and often slow with an axis of layers in them."""


def mapped(step: Callable[..., Any], *given: PyTree[Array | np.ndarray]) -> Any:
    """`jax.vmap(step)(*given)`, one layer after another where layers are large and lie on one device.

    Example:
        >>> import jax.numpy as jnp
        >>> mapped(jnp.sum, jnp.ones((3, 4))).tolist()
        [4.0, 4.0, 4.0]
    """
    given = jax.tree.map(jnp.asarray, given)
    arrays = jax.tree.leaves(given)
    if is_shared(arrays) or explicit_mesh(*arrays) is not None:
        return jax.vmap(step)(*given)
    if len(arrays[0]) == 1:
        return jax.tree.map(lambda a: jnp.asarray(a)[None], step(*layer_of(given, 0)))
    if max(math.prod(a.shape[1:]) for a in arrays) < _LARGE:
        return jax.vmap(step)(*given)
    if not any(isinstance(a, jax.core.Tracer) for a in arrays):  # programs of one layer, which others share
        return jax.tree.map(lambda *a: jnp.stack(a), *(step(*layer_of(given, i)) for i in range(len(arrays[0]))))
    return lax.map(lambda layer: step(*layer), given)


def layer_of(given: PyTree[Array], number: int) -> Any:
    """One layer of all."""
    return jax.tree.map(lambda a: a[number], given)
