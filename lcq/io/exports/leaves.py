"""Leaves on their way out: declared all at once, then read one after another, a layer of a stack at a time.

Of a tree in memory, or of an `.lcq` file, of which only one leaf is held. What other programs cannot hold, tables
without a grid, masks, factors and sums, is refused with its cost, or is replaced by the nearest that they can.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from lcq.forms import Cast, Codes, Form, bitpack, is_form
from lcq.forms.dtypes import native
from lcq.forms.restored import check_restored
from lcq.forms.validate import named
from lcq.io.exports.names import Name, resolve_names
from lcq.io.exports.steps import is_grid
from lcq.io.exports.working import Array, declared_codes, layer_of, on_host
from lcq.io.file import declared_leaves, each_leaf
from lcq.io.host import host_array
from lcq.io.tree_paths import Leaf, flatten, is_empty
from lcq.schemes import Uniform

NO_TARGET = "tables without a grid, masks, factors and sums, unless `nearest=`"
"""What no format takes, in the documentation."""


class Item(NamedTuple):
    """A leaf, or one layer of a stack.

    Attributes:
        path: of the leaf.
        name: that it will have.
        rule: what gave the name.
        value: codes on a grid in the working layout, or an array; in numpy, or shape structs if it is declared only.
        error: how far a replacement is from the leaf, ||w' - w|| / ||w||.
        why: what was replaced.
    """

    path: str
    name: str
    rule: Name
    value: Codes | Array
    error: float = 0.0
    why: str = ""


class Items(NamedTuple):
    """All that goes out.

    Attributes:
        declared: every item, with shape structs for arrays.
        read: gives every item again, one after another, with its arrays.
    """

    declared: tuple[Item, ...]
    read: Callable[[], Iterator[Item]]


def items_of(
    forms: PyTree | str | os.PathLike[str],
    names: Sequence[Name],
    default: Sequence[Name],
    nearest: int | None = None,
    limit: float | None = None,
) -> Items:
    """What goes out of a tree of forms and arrays, or of an `.lcq` file.

    Args:
        forms: the tree, or the path of a file.
        names: the user's.
        default: the format's.
        nearest: bits of grids that stand for tables without one; None to refuse these, and masks, factors and sums.
        limit: bytes that one leaf of a file may take; by default as `lcq.load` for a whole file.

    Raises:
        ValueError: nothing to write, names that do not fit, two tensors of one name, or what no other program holds;
            names the leaf.
    """
    if isinstance(forms, str | os.PathLike):
        path = forms
        leaves = [leaf for leaf in declared_leaves(path) if not is_empty(leaf)]

        def read() -> Iterator[Leaf]:
            return (leaf for _, leaf in each_leaf(path, limit) if not is_empty(leaf))
    else:
        check_restored(forms)
        leaves = [leaf for leaf in flatten(forms)[0] if not is_empty(leaf)]

        def read() -> Iterator[Leaf]:
            return iter(leaves)

    rules = resolve_names([leaf.path for leaf in leaves], names, default)
    kept = [leaf for leaf in leaves if rules[leaf.path].name is not None]
    if nearest is None:
        refuse_what_has_no_target(kept, read)
    elif not 2 <= nearest <= 8:
        raise ValueError(f"nearest: expected 2 to 8 bits, got {nearest}")
    declared = [item for leaf in kept for item in _layers(leaf, rules[leaf.path], nearest, read=False)]
    if not declared:
        why = "names leave all leaves out; drop a Name(.., None)" if leaves else "there are none; give forms or arrays"
        raise ValueError(f"expected at least one leaf to write, got none: {why}")
    seen = dict[str, str]()
    for item in declared:
        if item.name in seen:
            raise ValueError(
                f"{item.path}: expected a name of its own, got {item.name!r}, as {seen[item.name]} has; "
                "say another lcq.io.Name for one of them"
            )
        seen[item.name] = item.path

    def items() -> Iterator[Item]:
        for leaf in read():
            if rules[leaf.path].name is not None:
                yield from _layers(leaf, rules[leaf.path], nearest, read=True)

    return Items(tuple(declared), items)


def _layers(leaf: Leaf, rule: Name, nearest: int | None, read: bool) -> Iterator[Item]:
    """The items of a leaf; a form is unpacked once for all of its layers."""
    value = leaf.value
    whole: Codes | Array
    with named(leaf.path):
        if isinstance(value, Cast):
            value = value.values
        if isinstance(value, Codes):
            whole = on_host(value) if read else declared_codes(value, rule.stacked)
        elif is_form(value):
            whole = np.asarray(value.dense()) if read else jax.ShapeDtypeStruct(value.shape, jnp.dtype(value.dtype))
        elif isinstance(value, jax.ShapeDtypeStruct):
            whole = value
        else:
            whole = host_array(leaf.path, native(value))
    replaced = nearest is not None and isinstance(value, Codes) and not is_grid(value)
    why = f"{value.describe()} made dense" if is_form(value) and not isinstance(value, Codes) else ""
    for index, name in rule.places(leaf.path, np.shape(value) if not is_form(value) else value.shape):
        if isinstance(whole, Codes):
            layer = layer_of(whole, index) if read else whole
            if replaced:
                assert nearest is not None
                made, error = nearest_grid(layer, nearest) if read else (_grid_structs(layer, nearest), 0.0)
                yield Item(leaf.path, name, rule, made, error, f"a grid for {layer.size_of_table} levels")
                continue
            yield Item(leaf.path, name, rule, layer)
        elif read:
            assert isinstance(whole, np.ndarray)
            yield Item(leaf.path, name, rule, whole[index] if index else whole, why=why)
        else:
            yield Item(leaf.path, name, rule, jax.ShapeDtypeStruct(whole.shape[len(index) :], whole.dtype), why=why)


def _has_target(value: object) -> bool:
    return not is_form(value) or isinstance(value, Cast) or (isinstance(value, Codes) and is_grid(value))


def refuse_what_has_no_target(
    leaves: Sequence[Leaf], read: Callable[[], Iterator[Leaf]], *, option: bool = True
) -> None:
    """Raises ValueError for tables without a grid, masks, factors and sums, with what the nearest costs.

    Args:
        leaves: that are to go out.
        read: gives them with their numbers.
        option: whether there is a `nearest` to be asked for.
    """
    bad = [leaf for leaf in leaves if not _has_target(leaf.value)]
    if not bad:
        return
    path, more = bad[0].path, f" (and {len(bad) - 1} other leaves)" if len(bad) > 1 else ""
    form: Form = next(leaf.value for leaf in read() if leaf.path == path)
    if not isinstance(form, Codes):
        dense = math.prod(form.shape) * jnp.dtype(form.dtype).itemsize
        raise ValueError(
            f"{path}: expected codes on a grid or an array, got {form.describe()}, which has no place in other "
            f"programs' files{more}; {'nearest= writes it dense' if option else 'call lcq.decompress on it first'}, "
            f"{dense:,} bytes for {form.bits // 8:,}"
        )
    few = max(2, min(8, bitpack.width(form.size_of_table)))
    costs = {bits: nearest_grid(on_host(form), bits)[1] for bits in sorted({few, 8})}
    first = "say nearest=BITS to write it, or " if option else ""
    told = ", ".join(f"of {bits} bits moves its weights by {cost:.2g} of their norm" for bits, cost in costs.items())
    raise ValueError(
        f"{path}: expected levels that are multiples of one number, got {form.describe()}, which has no place in other "
        f"programs' files{more}; the nearest grid {told}: {first}compress with lcq.Uniform"
    )


def nearest_grid(form: Codes, bits: int) -> tuple[Codes, float]:
    """The grid of so many bits, blocks as its tables have, that is nearest to codes of a table, and how far it is."""
    dense = np.asarray(jax.tree.map(jnp.asarray, form).dense(), np.float32)
    made = on_host(Uniform(bits, per=_lengths(form), scale_dtype="float32").project(jnp.asarray(dense)))
    slip = np.asarray(jax.tree.map(jnp.asarray, made).dense(), np.float32) - dense
    norm = float(np.linalg.norm(dense))
    return made, float(np.linalg.norm(slip)) / norm if norm else 0.0


def _grid_structs(form: Codes, bits: int) -> Codes:
    half = 1 << (bits - 1)
    scale = jax.ShapeDtypeStruct(_counts(form), np.float32)
    values = tuple(map(float, range(-half, half)))
    return dataclasses.replace(form, levels=None, zero=None, scale=scale, values=values, dtype="float32")


def _counts(form: Codes) -> tuple[int, ...]:
    rank = len(form.shape)
    return next((tuple(a.shape[:rank]) for a in (form.levels, form.scale, form.zero) if a is not None), (1,) * rank)


def _lengths(form: Codes) -> tuple[int, ...]:
    return tuple(0 if count == 1 else n // count for n, count in zip(form.shape, _counts(form), strict=True))
