"""What `quantize` will give, before anything is computed: the forms' shapes, from the products of a function."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcq import forms
from lcq.forms import Codes
from lcq.forms.base import Form, is_form
from lcq.forms.blocks import block_counts
from lcq.forms.dtypes import wider
from lcq.forms.validate import named
from lcq.ptq.block_numbers import period
from lcq.ptq.leaf_assembly import axes_of, of_leaf
from lcq.ptq.rounding.coded import codes_of, tables, with_codes
from lcq.ptq.tasks import check_paths, decide
from lcq.schemes import Trellis
from lcq.tracing.contraction import Product
from lcq.tracing.param_flow import trace
from lcq.tree.aliases import Batch, Params
from lcq.tree.lazy import shape_of
from lcq.tree.paths import flatten
from lcq.tree.rules import Rule, Task


def preview(
    fn: Callable[[Any, Any], Any], params: Params, batch: Batch, rules: Sequence[Rule], *, rtn: Sequence[Rule] = ()
) -> tuple[Any, tuple[Task, ...]]:
    """The tree that `quantize(fn, params, [batch], rules, rtn=rtn)` gives, with shape structs in its forms.

    Scales and codebooks that come out equal, and then are stored once, are counted for each.

    Args:
        fn: (params, batch) -> anything; traced, never run.
        params: a tree of arrays or shape structs; leaves that are forms stay.
        batch: one batch, of arrays or shape structs.
        rules: as for `quantize`.
        rtn: likewise.

    Returns:
        The tree, and the tasks that are projected before the walk, whose forms are not in it.

    Raises:
        ValueError: as `quantize` does, for rules, shapes and what cannot be followed.
    """
    leaves, structure = flatten(params)
    given = {path: leaf for path, leaf in leaves.items() if is_form(leaf)}
    shapes = {path: jax.eval_shape(leaf.dense) if is_form(leaf) else shape_of(leaf) for path, leaf in leaves.items()}
    dense = jax.tree.unflatten(structure, shapes.values())
    chosen, seeds, direct = decide(rules, rtn, dense, given)
    blocks = {path: np.zeros(shapes[path].shape, np.int64) for path in chosen}
    found: dict[str, list[Product]] = {path: [] for path in chosen}
    program = trace(fn, dense, batch, chosen)
    check_paths(program, chosen, seeds, dense)
    for product in program.products:
        path = product.path
        places, flat = product.places(shapes[path].shape), blocks[path].reshape(-1)
        if not flat[places].any():  # else an earlier product has chosen its codes
            flat[places] = _numbers(product, chosen[path]) + flat.max() + 1
            found[path].append(product)
    made = {
        path: _form(shapes[path], chosen[path], numbers, found[path], seeds.get(path))
        for path, numbers in blocks.items()
    }
    return jax.tree.unflatten(structure, (leaves | made).values()), tuple(direct)


def _numbers(product: Product, rule: Rule) -> np.ndarray:
    """The number of its block for each weight [G, N, n] of a product."""
    groups, _, many, neurons = product.shape
    per: Any = getattr(rule.scheme, "per", None)
    with named(product.path, ", the inputs of its product; choose a length that does"):
        inputs, columns = block_counts(per, (many, groups * neurons))
    counts = (groups if rule.stacked or columns > 1 else 1, inputs, neurons if columns > 1 else 1)
    numbers = np.arange(math.prod(counts)).reshape(counts).repeat(many // inputs, 1)
    return np.broadcast_to(numbers, (groups, many, neurons))


def _form(leaf: Any, rule: Rule, blocks: np.ndarray, products: Sequence[Product], seed: int | None) -> Form:
    """The form of a whole leaf."""
    scheme: Any = rule.scheme
    if scheme.host:
        scheme = dataclasses.replace(scheme, exact=False)
    inputs = products[0].shape[2] if isinstance(scheme, Trellis) else 1
    group = (scheme.per if isinstance(scheme.per, int) else inputs, 1)  # one block, whose numbers are as of all
    one = jax.eval_shape(
        scheme.project, jax.ShapeDtypeStruct(group, leaf.dtype if seed is None else wider(leaf.dtype, jnp.float32))
    )
    assert isinstance(one, Codes | forms.Trellis)
    counts = tuple(n // period(axis, blocks) for axis, n in enumerate(blocks.shape))
    spread: dict[str, Any] = {
        name: jax.ShapeDtypeStruct((*counts, *a.shape[2:]), a.dtype) for name, a in tables(one).items()
    }
    spread |= axes_of(one, leaf.shape, products)
    codes = jax.ShapeDtypeStruct(leaf.shape, codes_of(one).dtype)
    whole = dataclasses.replace(with_codes(one, codes), **spread)
    return of_leaf(whole, leaf.shape, str(leaf.dtype), products, seed)
