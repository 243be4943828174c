"""Biases: parameters that are added to the result of a product, one number for each neuron, and used nowhere else."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lcq.tracing.contraction import Product
from lcq.tracing.jaxpr import IN_PLACE
from lcq.tracing.param_site import ParamSite
from lcq.tracing.values import Value


class Added(NamedTuple):
    """That a parameter is added to the result of a product, or to a part of it.

    Attributes:
        result: what it is added to.
        sign: +1, or -1 where it is subtracted.
        shape: of the sum.
        axis: along which there may be other parameters beside it.
        start: where it begins on that axis.
        stop: where it ends there; None at the end.
    """

    result: Value
    sign: int
    shape: tuple[int, ...]
    axis: int = 0
    start: int = 0
    stop: int | None = None

    def pieces(self, value: Value) -> "list[Added | None]":
        """The same of each piece of a parameter that is joined of several."""
        ends = np.cumsum([0, *value.joint.lengths]).tolist()
        spans = zip(value.pieces, ends, ends[1:], strict=False)
        return [None if piece.pieces else self._replace(axis=value.axis, start=a, stop=b) for piece, a, b in spans]


class Ending(NamedTuple):
    """Where a followed leaf ends that is not selected; `added` says to which result."""

    site: ParamSite
    added: Added | None


class BiasPart(NamedTuple):
    """A leaf, or a part of one, that is added to neurons of a product.

    Attributes:
        path: Path of the leaf in the tree.
        neurons: Flat places among the product's, [G n].
        elements: Their flat places in the leaf.
    """

    path: str
    neurons: np.ndarray
    elements: np.ndarray


class BiasSite(NamedTuple):
    """What is added to the result of a product, one number for each neuron, and used nowhere else.

    Attributes:
        sign: Sign with which it is added: +1, or -1 where it is subtracted, like the mean of a batch norm.
        parts: One for each leaf; together they have every neuron once.
    """

    sign: int
    parts: tuple[BiasPart, ...]

    def is_same(self, other: "BiasSite | None") -> bool:
        """Whether another trace has the same."""
        return other is not None and [(p.path, p.neurons.tolist(), p.elements.tolist()) for p in self.parts] == [
            (p.path, p.neurons.tolist(), p.elements.tolist()) for p in other.parts
        ]


def bias_sites(
    uses: Mapping[str, Sequence[Ending]], shapes: Mapping[str, tuple[int, ...]], products: Sequence[Product]
) -> dict[int, BiasSite]:
    """What can take a constant added to each neuron of a product, by the product's number.

    Args:
        uses: where leaves end, by path; not of those that are rounded.
        shapes: of the leaves.
        products: all, by number.
    """
    found: dict[int, BiasSite] = {}
    for path, endings in uses.items():
        if all(ending.added is None for ending in endings):
            continue
        places = [ending.site.elements(shapes[path]) for ending in endings]
        often = _uses_of_each(places, math.prod(shapes[path]))
        for (_, added), each in zip(endings, places, strict=True):
            if added is None or (often[each] > 1).any():
                continue
            result = added.result.result
            assert result is not None
            if all(value.reads == 1 for value in (added.result, *result.before)):
                part = _per_neuron(path, products[result.number], added, each)
                if part is not None:
                    before = found.get(result.number, BiasSite(added.sign, ()))
                    found[result.number] = before._replace(parts=(*before.parts, part))
    return {number: site for number, site in found.items() if _is_whole(site, products[number])}


def _per_neuron(path: str, product: Product, added: Added, places: np.ndarray) -> BiasPart | None:
    """The place in the bias of each neuron that it is added to; None unless neurons and places go one to one."""
    assert added.result.result is not None
    g, _, _, n = product.shape
    moves = [step for step in added.result.result.steps if step.primitive.name not in IN_PLACE]
    number = product.spread(np.arange(g * n, dtype=np.int32).reshape(g, n))
    neurons = functools.reduce(lambda a, step: step.on_host(a), moves, np.broadcast_to(number, product.y.shape))
    if neurons.shape != added.shape:
        return None
    if neurons.ndim:
        neurons = neurons[(slice(None),) * added.axis + (slice(added.start, added.stop),)]
    of, at = np.asarray(neurons).reshape(-1), np.broadcast_to(places, neurons.shape).reshape(-1)
    result = np.full(g * n, -1, np.int64)
    result[of] = at
    here = np.flatnonzero(result >= 0)
    one_to_one = (result[of] == at).all() and len(np.unique(result[here])) == len(here)
    return BiasPart(path, here, result[here]) if one_to_one else None


def _is_whole(site: BiasSite, product: Product) -> bool:
    """Whether every neuron is in one part."""
    g, _, _, n = product.shape
    neurons = np.concatenate([part.neurons for part in site.parts])
    return len(neurons) == g * n == len(np.unique(neurons))


def _uses_of_each(places: Sequence[np.ndarray], size: int) -> np.ndarray:
    """How many of these arrays each of the numbers below size is in."""
    often = np.zeros(size, np.int64)
    for each in places:
        inside = np.zeros(size, bool)
        inside[each] = True
        often += inside
    return often
