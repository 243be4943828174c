"""Activation-aware scales: channels that carry much are rounded more finely."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lcq.forms.dtypes import own_promotion
from lcq.ptq.batches import Mask, traced
from lcq.ptq.gathering import LastMoments, sizes
from lcq.ptq.layer import codebook_of
from lcq.ptq.rounding import RTN
from lcq.ptq.sums import Sums
from lcq.ptq.tasks import decide
from lcq.ptq.transforms.base import Places, Transformed, TransformRecord
from lcq.ptq.two_stream import Visit, walk
from lcq.tracing.contraction import Unit
from lcq.tracing.scaling import Group
from lcq.tree.aliases import Batch, Function, Params
from lcq.tree.rules import Rule, Rules

_LEAST = 1e-4
"""The smallest mean |x| of a channel, in units of the largest."""


class _Seen(NamedTuple):
    """What a walk has seen of one product.

    Attributes:
        rule: Its scheme.
        path: Of the leaf.
        w: The weights [G, N, n].
        gram: X'X [G, N, N].
        size: Mean |x| [G, N].
        symbols: Of the inputs [G, N].
    """

    rule: Rule
    path: str
    w: np.ndarray
    gram: Array
    size: np.ndarray
    symbols: np.ndarray


def activation_aware(
    fn: Function,
    params: Params,
    calibration: Iterable[Batch],
    rules: Rules,
    mask: Mask = None,
    *,
    grid: int = 20,
) -> Transformed:
    """Scales the inputs of products by a power of what they carry; the function stays as it is.

        s_j = (mean |x_j|)^alpha,    W[j, :] <- W[j, :] s_j,   what makes x_j <- 1/s_j of it

        alpha = argmin over {0, 1/grid, ..} of sum over products ||X diag(1/s) Q(diag(s) W) - X W||^2 / ||X W||^2

    A channel whose weights are larger is rounded with a smaller relative error: where much goes through, that pays. The
    places are those of `equalize`: from the gain of a norm to the products that share it, from a gated product to the
    one behind the gate, from values to the output, from layer to layer. Q rounds to nearest, by the scheme that the
    rules have for each product; X are its inputs in the given net, of all batches. Every place is chosen for itself.

    Args:
        fn: (params, batch) -> anything, as for `lcq.quantize`.
        params: a tree of arrays; leaves that are forms already stay as they are.
        calibration: batches of unlabelled inputs.
        rules: as for `lcq.quantize`. Products without a rule are scaled along, and have no say.
        mask: which positions of a batch count, see `lcq.quantize`.
        grid: how many alphas below 1 are tried.

    Returns:
        Parameters with which fn is the same up to rounding errors, and records. `setting` is alpha, `before` and
        `after` are the mean over products of the relative squared error at alpha = 0 and at the chosen one.

    Raises:
        ValueError: no rules, no alpha, or as `lcq.quantize` does; names the leaf.

    Example:
        >>> import lcq
        >>> def net(p, x):
        ...     return jax.nn.relu(x @ p["w1"]) @ p["w2"]
        >>> keys = jax.random.split(jax.random.key(0), 3)
        >>> params = {"w1": jax.random.normal(keys[0], (8, 16)), "w2": jax.random.normal(keys[1], (16, 4))}
        >>> params["w1"] = params["w1"].at[:, 3].multiply(20)
        >>> x, rules = jax.random.normal(keys[2], (64, 8)), [lcq.Rule("w2", lcq.Uniform(3, per="channel"))]
        >>> (record, *_) = activation_aware(net, params, [x], rules).records
        >>> record.consumers, record.after < 0.5 * record.before
        (('w2',), True)

    Source: Lin et al., arXiv 2306.00978, section 3.2.
    """
    if grid < 1:
        raise ValueError(f"grid: expected at least one alpha to choose from, got {grid}; leave it out for 20")
    if not rules:
        raise ValueError("expected rules, for whose schemes scales are chosen, got none; pass those of lcq.quantize")
    places = Places(fn, params, calibration, rules)
    chosen, seeds, _ = decide(rules, (), places.tree, places.forms)
    groups = places.groups()
    reasons = [_reason(group, chosen, seeds) for group in groups]
    values: dict[int, float] = {}
    told: dict[int, TransformRecord] = {}
    free = [group for group, why in zip(groups, reasons, strict=True) if not why]
    for group, seen in _walked(places, free, chosen, mask):
        alpha, factors, before, after = _best(group, seen, grid)
        values.update(zip(group.symbols.tolist(), (1 / factors).tolist(), strict=True))
        told[id(group)] = TransformRecord(
            "activation_aware", *places.names(group), len(group.symbols), "", f"alpha={alpha:g}", before, after
        )
    values, beyond = places.in_range(free, values)
    told |= {id(free[i]): places.refused("activation_aware", free[i], reason) for i, reason in beyond.items()}
    records = [
        told.get(id(group)) or places.refused("activation_aware", group, why)
        for group, why in zip(groups, reasons, strict=True)
    ]
    return Transformed(places.with_factors(values), tuple(records))


def _reason(group: Group, chosen: dict[str, Rule], seeds: dict[str, int]) -> str:
    """Why nothing is chosen for a group; "" if something is."""
    if group.reason:
        return group.reason
    uses = [use for use in group.consumers if use.role == "product" and use.path in chosen]
    if not uses:
        return "no product with a rule reads these channels"
    if rotated := [use.path for use in uses if use.path in seeds]:
        return f"{rotated[0]} is rounded in turned coordinates, where no input stands out"
    if impure := [use for use in uses if not use.pure]:
        return f"{impure[0].path} is multiplied with something before {impure[0].source}"
    return ""


def _walked(
    places: Places, groups: list[Group], chosen: dict[str, Rule], mask: Mask
) -> Iterator[tuple[Group, list[_Seen]]]:
    """Each group with what was seen of the products that read its channels, as soon as all are."""
    paths = {use.path for group in groups for use in group.consumers if use.role == "product" and use.path in chosen}
    if not paths:
        return
    programs, inputs = traced(places.fn, places.tree, places.batches, paths, mask)
    below = {path: _symbols(places, path) for path in paths}
    owners = {symbol: g for g, group in enumerate(groups) for symbol in group.symbols.tolist()}
    inside = [_inputs(unit, below) for unit in programs[0].units]
    readers: list[set[int]] = [set() for _ in groups]
    for u, symbols in enumerate(inside):
        for symbol in np.unique(symbols).tolist():
            if symbol in owners:
                readers[owners[symbol]].add(u)
    seen: dict[int, _Seen] = {}
    last = LastMoments()
    done: set[int] = set()
    for visit in walk(programs, places.dense, dict(places.dense), inputs):
        unit = visit.unit
        visit.finish()
        if unit is None:
            continue
        u = programs[0].units.index(unit)
        last.wanted = visit.is_followed
        seen[u] = _see(visit, places, chosen[unit.path], inside[u], last)
        for g, group in enumerate(groups):
            if g not in done and readers[g] and readers[g] <= seen.keys():
                done.add(g)
                yield group, [seen[reader] for reader in sorted(readers[g])]
        waiting = {reader for g, of in enumerate(readers) if g not in done for reader in of}
        seen = {number: each for number, each in seen.items() if number in waiting}


def _symbols(places: Places, path: str) -> np.ndarray:
    """The factor of what goes in, for every weight of a leaf."""
    found = np.zeros(np.size(places.dense[path]), np.int64)
    for use in places.found.uses:
        if use.path == path:
            found[use.places] = places.found.symbols.roots(use.below)
    return found


def _inputs(unit: Unit, below: dict[str, np.ndarray]) -> np.ndarray:
    """The factors of the inputs [G, N] of a product."""
    return below[unit.path][unit.product.places(unit.shape)][:, :, 0]


@own_promotion()
def _see(visit: Visit, places: Places, rule: Rule, symbols: np.ndarray, last: LastMoments) -> _Seen:
    product = visit.product
    w = np.asarray(product.weights(product.weight.moved_on_host(places.dense[product.path])), np.float32)
    sums = Sums.of(visit.uses, RTN(), jnp.asarray(w), False, last=last)
    if not sums.finite:
        raise ValueError(f"{product.path}: expected finite inputs, got NaN or infinite ones at {product.source}")
    gram = sums.settled(np.zeros((len(w), 2)), False).statistics.gram
    each = [sizes(use) for use in visit.uses]
    total, many = (np.asarray(sum(part), np.float64) for part in zip(*each, strict=True))
    return _Seen(rule, product.path, w, gram, total / np.maximum(many, 1)[:, None], symbols)


@own_promotion()
def _best(group: Group, seen: list[_Seen], grid: int) -> tuple[float, np.ndarray, float, float]:
    """alpha, the factors of the channels, and the errors at 0 and at alpha."""
    order = np.argsort(group.symbols)
    known = group.symbols[order]
    total, many = np.zeros(len(order)), np.zeros(len(order))
    places = []
    for each in seen:
        at = np.searchsorted(known, each.symbols).clip(0, len(order) - 1)
        here = known[at] == each.symbols
        places.append((order[at], here))
        np.add.at(total, order[at][here], each.size[here])
        np.add.at(many, order[at][here], 1)
    size = total / np.maximum(many, 1)
    size = np.maximum(size, _LEAST * size.max()) if size.max() > 0 else np.ones_like(size)
    found = []
    for step in range(grid):
        factors = size ** (step / grid)
        factors = factors / np.sqrt(factors.max() * factors.min())
        scales = [np.where(here, factors[at], 1.0) for at, here in places]
        error = float(np.mean([_error(each, s) for each, s in zip(seen, scales, strict=True)]))
        found.append((error, step, factors))
    error, step, factors = min(found, key=lambda each: each[:2])
    return step / grid, factors, found[0][0], error


def _error(seen: _Seen, scale: np.ndarray) -> float:
    """||X diag(1/s) Q(diag(s) W) - X W||^2 / ||X W||^2 of all groups together."""
    s = scale[:, :, None].astype(np.float32)
    form, _ = codebook_of(seen.path, seen.w * s, seen.rule)
    rounded = jax.vmap(lambda one: one.dense())(jax.tree.map(jnp.asarray, form))
    error, size = _squared(rounded / s - seen.w, seen.gram), _squared(jnp.asarray(seen.w), seen.gram)
    return float(error / size) if size > 0 else 0.0


@jax.jit
def _squared(w: Float[Array, "G N n"], gram: Float[Array, "G N N"]) -> Float[Array, ""]:
    """||X w||^2 by X'X."""
    return (jnp.einsum("gij,gjn->gin", gram, w, precision=jax.lax.Precision.HIGHEST) * w).sum()
