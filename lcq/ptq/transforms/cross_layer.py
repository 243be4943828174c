"""Cross-layer equalization: each channel as large where it is made as where it is used."""

from collections.abc import Iterable

import numpy as np

from lcq.ptq.batches import Mask
from lcq.ptq.transforms.base import Places, Transformed, TransformRecord, paths_of
from lcq.tracing.factors import Use
from lcq.tracing.scaling import Group
from lcq.tree.aliases import Batch, Function, Params
from lcq.tree.rules import Rules

_SETTLED = 1e-3


def equalize(
    fn: Function,
    params: Params,
    calibration: Iterable[Batch],
    rules: Rules = (),
    mask: Mask = None,
    *,
    sweeps: int = 20,
) -> Transformed:
    """Scales channels between products so that the largest weights of each are alike; the function stays as it is.

        s_j = sqrt(b_j / a_j),   a_j = max |W1[:, j]|,  b_j = max |W2[j, :]|
        W1[:, j] <- W1[:, j] s_j,   W2[j, :] <- W2[j, :] / s_j

    where channel j goes from W1 to W2 through functions f with f(s x) = s f(x) alone: relu, max and mean pooling,
    moves, a product with what is not scaled (a gate, softmax weights). Of several products that make or use a channel
    the largest weight counts. The gain of a norm makes channels without weights, and that of a batch norm uses them
    so: there, all channels become as large as their geometric mean. Biases are scaled with their channels. All groups
    of channels are gone through until no scale changes by more than a thousandth.

    With a scheme per channel or group the products that use a channel gain: inputs are then alike. Those that make it
    are the same but for scales, which only schemes per leaf notice.

    Args:
        fn: (params, batch) -> anything; traced on the shapes of all batches, never run.
        params: a tree of arrays; leaves that are forms already stay as they are.
        calibration: batches; only shapes are looked at.
        rules: what will be compressed; channels that meet no such weight stay. Without any, all weights count.
        mask: as `lcq.quantize` has it; makes no difference here.
        sweeps: over all channels, at most.

    Returns:
        Parameters with which fn is the same up to rounding errors, and records. `before` and `after` are the spread of
        the channels' sizes: the standard deviation of log2 a_j, and that of log2 b_j, of the two their mean.

    Raises:
        ValueError: no batch, no sweep, or leaves that are no arrays; names the leaf.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> def net(p, x):
        ...     return jax.nn.relu(x @ p["w1"]) @ p["w2"]
        >>> params = {"w1": jnp.array([[8.0, 1.0]]), "w2": jnp.array([[2.0], [4.0]])}
        >>> done = equalize(net, params, [jnp.ones((5, 1))])
        >>> done.params["w1"].tolist(), done.params["w2"].tolist()
        ([[4.0, 2.0]], [[4.0], [2.0]])
        >>> [(record.producers, record.consumers, record.reason) for record in done.records]
        [(('w1',), ('w2',), ''), (('w2',), (), 'the output of the function')]

    Source: Nagel et al., arXiv 1906.04721, section 4.1, for convolutions with ReLU; the places are lcq's.
    """
    del mask
    if sweeps < 1:
        raise ValueError(f"sweeps: expected at least one, got {sweeps}; leave it out for 20")
    places = Places(fn, params, calibration, rules)
    groups = places.groups()
    free = [group for group in groups if not group.reason]
    values: dict[int, float] = {}
    weights = {
        use.path: places.scaled(use.path, values) for group in free for use in (*group.producers, *group.consumers)
    }
    before = [_spread(places, group, weights) for group in free]
    for _ in range(sweeps):
        largest = 0.0
        for group in free:
            step = _step(places, group, weights)
            if (moved := np.abs(np.log(step)).max(initial=0.0)) <= _SETTLED:
                continue
            largest = max(largest, moved)
            for symbol, factor in zip(group.symbols.tolist(), step.tolist(), strict=True):
                values[symbol] = values.get(symbol, 1.0) * factor
            for path in paths_of((*group.producers, *group.consumers)):
                weights[path] = places.scaled(path, values)
        if largest <= _SETTLED:
            break
    values, reasons = places.in_range(free, values)
    weights = {path: places.scaled(path, values) for path in weights}
    after = [_spread(places, group, weights) for group in free]
    told = {
        id(group): TransformRecord("equalize", *places.names(group), len(group.symbols), before=one, after=two)
        for i, (group, one, two) in enumerate(zip(free, before, after, strict=True))
        if i not in reasons
    }
    told |= {id(free[i]): places.refused("equalize", free[i], reason) for i, reason in reasons.items()}
    records = tuple(told.get(id(group)) or places.refused("equalize", group) for group in groups)
    return Transformed(places.with_factors(values), records)


def _step(places: Places, group: Group, weights: dict[str, np.ndarray]) -> np.ndarray:
    """What each channel is to be multiplied by; 1 where all of its weights are zero on one side."""
    made, used = (
        _largest(places, group, uses, weights, above)
        for uses, above in ((group.producers, True), (group.consumers, False))
    )
    if made is None and used is None:
        return np.ones(len(group.symbols))
    lives = np.all([each > 0 for each in (made, used) if each is not None], axis=0)
    if not lives.any():
        return np.ones(len(group.symbols))
    made, used = (None if each is None else np.where(lives, each, 1.0) for each in (made, used))
    if made is not None and used is not None:
        step = np.sqrt(used / made)
    elif made is not None:
        step = np.exp(np.log(made[lives]).mean()) / made
    else:
        assert used is not None
        step = used / np.exp(np.log(used[lives]).mean())
    return np.where(lives, step, 1.0)


def _spread(places: Places, group: Group, weights: dict[str, np.ndarray]) -> float:
    """The deviation of log2 of the largest weights of the channels, on both sides."""
    sides = (
        _largest(places, group, group.producers, weights, True),
        _largest(places, group, group.consumers, weights, False),
    )
    return float(
        np.mean([np.log2(each[each > 0]).std() if (each > 0).any() else 0.0 for each in sides if each is not None])
    )


def _largest(
    places: Places, group: Group, uses: Iterable[Use], weights: dict[str, np.ndarray], above: bool
) -> np.ndarray | None:
    """The largest weight of each channel; None without products."""
    found = [places.largest(group, use, weights[use.path], above) for use in uses if places.weighs(use)]
    return np.max(found, axis=0) if found else None
