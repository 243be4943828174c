"""What a transform is: it takes a function and its parameters, and gives others with which the function is the same."""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from typing_extensions import TypeAliasType

from lcq.forms.base import is_form
from lcq.forms.dtypes import nearest_number
from lcq.ptq.batches import Mask, checked_batches
from lcq.ptq.leaf_assembly import placed
from lcq.ptq.tasks import without_blocks
from lcq.tracing.contraction import region
from lcq.tracing.factors import Use
from lcq.tracing.scaling import Group, Scaling, scaling
from lcq.tree.aliases import Batch, Function, Leaves, Params
from lcq.tree.lazy import whole
from lcq.tree.paths import check_numbers, flatten
from lcq.tree.rules import Rules, checked, resolve


class TransformRecord(NamedTuple):
    """What was done at one place of a function, or why nothing was.

    Attributes:
        transform: Name of the transform.
        producers: Paths of the leaves that were multiplied, with indices where a leaf holds several, such as w[2:3].
        consumers: Likewise of those that took up the inverse.
        size: Number of channels that were scaled.
        reason: Why nothing was done; "" if it was.
        setting: What was chosen, such as alpha=0.5.
        before: Error, or spread, that the transform lowers, before it; None if it has none.
        after: Likewise after it.
    """

    transform: str
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    size: int
    reason: str = ""
    setting: str = ""
    before: float | None = None
    after: float | None = None


class Transformed(NamedTuple):
    """Other parameters of the same function.

    Attributes:
        params: A tree like the given one.
        records: One for each place where something could be moved, in the order of the net.
    """

    params: Params
    records: tuple[TransformRecord, ...]


Transform = TypeAliasType("Transform", Callable[[Function, Params, Sequence[Batch], Rules, Mask], Transformed])
"""A function of (fn, params, calibration, rules, mask): other parameters with which fn is the same."""


class Places:
    """The places of a function where factors can be moved, and its parameters.

    Attributes:
        fn: The function.
        batches: Of its inputs.
        leaves: By path; forms as they are.
        forms: Those that are forms.
        unchanged: Paths of forms and of Python's numbers, which stay.
        stay: Paths of others that stay, and why.
        dense: Their arrays.
        tree: The tree of these.
        found: The factors that its parameters may have.
        selected: Paths of the leaves that will be compressed; None for all.
    """

    def __init__(self, fn: Function, params: Params, calibration: Iterable[Batch], rules: Rules) -> None:
        self.fn, self.batches = fn, checked_batches(calibration)
        self.leaves, self.structure = flatten(params)
        check_numbers(self.leaves)
        for path, leaf in self.leaves.items():
            if isinstance(leaf, jax.ShapeDtypeStruct):
                raise ValueError(f"{path}: expected an array, which is scaled, got {leaf}; pass the parameters")
        self.forms = {path: leaf for path, leaf in self.leaves.items() if is_form(leaf)}
        self.dense: Leaves = {p: leaf.dense() if p in self.forms else whole(leaf) for p, leaf in self.leaves.items()}
        self.tree: Params = jax.tree.unflatten(self.structure, self.dense.values())
        self.unchanged = [path for path in self.leaves if path in self.forms or not hasattr(self.dense[path], "dtype")]
        self.stay = {
            path: f"{path} has NaN or infinite elements"
            for path, leaf in self.dense.items()
            if path not in self.unchanged and jnp.issubdtype(leaf.dtype, jnp.floating)
            if not np.isfinite(np.asarray(leaf, np.float64)).all()
        }
        self.found: Scaling = scaling(fn, self.tree, *self.batches, unchanged=self.unchanged, stay=self.stay)
        self.selected: Collection[str] | None = None
        if rules:
            bare = [dataclasses.replace(rule, scheme=without_blocks(rule)) for rule in checked(rules)]
            self.selected = {path for task in resolve(bare, self.tree) for path in task.paths}

    def groups(self) -> list[Group]:
        """Those with a product whose weights will be compressed."""
        return [group for group in self.found.groups if any(map(self.weighs, (*group.producers, *group.consumers)))]

    def weighs(self, use: Use) -> bool:
        """Whether a use is a product with weights that will be compressed."""
        return use.role == "product" and (self.selected is None or use.path in self.selected)

    def names(self, group: Group) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Paths of the producers and of the consumers of a group, with indices where they are parts of leaves."""
        made, used = ({self.name(use): None for use in uses} for uses in (group.producers, group.consumers))
        return tuple(made), tuple(used)

    def refused(self, name: str, group: Group, reason: str = "") -> TransformRecord:
        """The record of a group that stays as it is."""
        return TransformRecord(name, *self.names(group), 0, reason or group.reason)

    def name(self, use: Use) -> str:
        """The path of a use, with an index where it is a part of the leaf."""
        shape = np.shape(self.dense[use.path])
        return use.path if use.places.size == math.prod(shape) else use.path + region(use.places, shape)

    def scaled(self, path: str, values: dict[int, float]) -> np.ndarray:
        """A leaf with its factors, in float64."""
        leaf = np.asarray(self.dense[path], np.float64)
        return leaf * self.found.factors(path, leaf.size, values).reshape(leaf.shape)

    def with_factors(self, values: dict[int, float]) -> Params:
        """The tree of parameters, all factors applied."""
        changed = {use.path for use in self.found.uses if values}
        made = [self._like(path, values) if path in changed else leaf for path, leaf in self.leaves.items()]
        return jax.tree.unflatten(self.structure, made)

    def in_range(self, groups: Sequence[Group], values: dict[int, float]) -> tuple[dict[int, float], dict[int, str]]:
        """The factors without those of groups which they take out of the range of numbers of a leaf, and why, by the
        group's number."""
        reasons: dict[int, str] = {}
        values = dict(values)
        while found := {
            i: why for i, group in enumerate(groups) if i not in reasons and (why := self._beyond(group, values))
        }:
            reasons |= found
            for symbol in (symbol for i in found for symbol in groups[i].symbols.tolist()):
                values.pop(symbol, None)
        return values, reasons

    def _beyond(self, group: Group, values: dict[int, float]) -> str:
        """Which leaf has channels that overflow, or all of whose weights lose digits; "" if none has."""
        for uses, above in ((group.producers, True), (group.consumers, False)):
            for use in uses if any(symbol in values for symbol in group.symbols.tolist()) else ():
                leaf = np.asarray(self.dense[use.path])
                kind = jnp.finfo(leaf.dtype)
                before = self.largest(group, use, leaf.astype(np.float64), above)
                after = self.largest(group, use, self.scaled(use.path, values), above)
                if (after > float(kind.max)).any() or ((before >= float(kind.tiny)) & (after < float(kind.tiny))).any():
                    return f"{use.path} would leave the range of {leaf.dtype}"
        return ""

    def largest(self, group: Group, use: Use, leaf: np.ndarray, above: bool) -> np.ndarray:
        """max |W| of the weights of a use in each channel of a group; 0 for channels that it does not have."""
        symbols = self.found.symbols.find(use.above if above else use.below)
        sizes = np.abs(leaf.reshape(-1)[use.places])
        axes = tuple(axis for axis, length in enumerate(symbols.shape) if length == 1)
        sizes = sizes.max(axes, keepdims=True, initial=0.0)
        order = np.argsort(group.symbols)
        at = np.searchsorted(group.symbols[order], symbols.reshape(-1)).clip(0, len(order) - 1)
        here = group.symbols[order][at] == symbols.reshape(-1)
        found = np.zeros(len(order))
        np.maximum.at(found, order[at[here]], sizes.reshape(-1)[here])
        return found

    def _like(self, path: str, values: dict[int, float]) -> Any:
        leaf = self.dense[path]
        factors = self.found.factors(path, math.prod(np.shape(leaf)), values)
        if (factors == 1).all():
            return self.leaves[path]
        return placed(nearest_number(self.scaled(path, values), leaf.dtype), leaf)


def paths_of(uses: Iterable[Use]) -> tuple[str, ...]:
    """The leaves of some uses, each once."""
    return tuple(dict.fromkeys(use.path for use in uses))
