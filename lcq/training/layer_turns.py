"""One step for each layer of a stack, a few layers at a time: in a loop that writes over what it was given.

Mapped over all layers at once a step needs room for what it makes of all of them.
"""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int, PyTree

from lcq.forms.meshes import explicit_mesh, most_parts, placed_on, shared_mesh, spec_of
from lcq.tree.mapped import mapped

_T = TypeVar("_T")

_NUMBERS = 1 << 20
"""Of one turn, on each device, at least: turns of fewer would take longer than what they do."""


def each_layer(
    step: Callable[[Int[Array, ""], PyTree, _T], tuple[_T, Any]],
    given: PyTree[Array | np.ndarray],
    kept: _T,
    *,
    one_by_one: bool = False,
) -> tuple[_T, Any]:
    """What a step makes of each layer, and the sums over layers of what it says.

    Args:
        step: of the number of a layer, what is given of it, and what is kept, to what is kept then, and numbers.
        given: arrays whose first axis counts layers.
        kept: the same.
        one_by_one: for a step that cannot be mapped, nor traced.
    """
    given, kept = jax.tree.map(jnp.asarray, (given, kept))
    first = jax.tree.leaves(given)[0]
    if one_by_one:
        each = [step(jnp.int32(i), *jax.tree.map(lambda a, i=i: a[i], (given, kept))) for i in range(len(first))]
        kept, said = jax.tree.map(lambda *a: jnp.stack(a), *each)
        return kept, jax.tree.map(lambda a: jnp.sum(a, 0), said)
    layers, (parts, wide) = len(first), _turn_of(first)
    mesh = explicit_mesh(first)
    along = None if mesh is None else placed_on(mesh, spec_of(first)[:1])
    whole = (lax.broadcasted_iota(jnp.int32, (layers,), 0, out_sharding=along), given)
    if parts * wide == layers:
        kept, said = mapped(step, *whole, kept)
        return kept, jax.tree.map(lambda a: jnp.sum(a, 0), said)

    def laid(a: Array) -> Array:
        return a.reshape(parts, layers // parts, *a.shape[1:])

    def some(a: Array, i: Array) -> Array:
        return lax.dynamic_slice_in_dim(a, i * wide, wide, 1).reshape(parts * wide, *a.shape[2:])

    def turn(i: Array, kept: PyTree[Array]) -> tuple[PyTree[Array], Any]:
        here, said = mapped(step, *jax.tree.map(lambda a: some(a, i), (*whole_laid, kept)))
        kept = jax.tree.map(
            lambda a, b: lax.dynamic_update_slice_in_dim(a, b.reshape(parts, wide, *b.shape[1:]), i * wide, 1),
            kept,
            here,
        )
        return kept, jax.tree.map(lambda a: jnp.sum(a, 0), said)

    whole_laid = jax.tree.map(laid, whole)
    start = jax.tree.map(laid, kept)
    nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(turn, jnp.int32(0), start)[1])

    def proceed(i: Array, state: Any) -> Any:
        kept, said = turn(i, state[0])
        return kept, jax.tree.map(jnp.add, state[1], said)

    ended, said = lax.fori_loop(0, layers // parts // wide, proceed, (start, nothing))
    return jax.tree.map(lambda a: a.reshape(layers, *a.shape[2:]), ended), said


def _turn_of(stack: Array) -> tuple[int, int]:
    """Into how many parts layers are cut, so that each lies on one device, and how many of a part are in a turn."""
    layers, mesh = len(stack), shared_mesh(stack)
    if explicit_mesh(stack) is not None:
        parts = layers if spec_of(stack)[0] is not None else 1
    else:
        parts = 1 if mesh is None else most_parts(layers, mesh)
    each = layers // parts
    wish = _NUMBERS * (1 if mesh is None else mesh.size) // (parts * math.prod(stack.shape[1:]))
    return parts, max(n for n in range(1, each + 1) if each % n == 0 and n <= max(wish, 1))
