"""Rotations folded into weights: their entries become alike, and no channel stands out."""

import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from lcq.forms.dtypes import nearest_number
from lcq.ptq.batches import Mask
from lcq.ptq.leaf_assembly import placed
from lcq.ptq.transforms.base import Places, Transformed, TransformRecord
from lcq.ptq.transforms.orthogonal import orthogonal
from lcq.tracing.mixing import Cell, Mixtures, mixtures
from lcq.tracing.scaling import Group
from lcq.tree.aliases import Batch, Function, Params
from lcq.tree.rules import Rules


def rotate(
    fn: Function,
    params: Params,
    calibration: Iterable[Batch],
    rules: Rules = (),
    mask: Mask = None,
    *,
    key: jax.Array | np.integer | int = 0,
) -> Transformed:
    """Turns channels by random orthogonal matrices that the weights on both sides take up; the function stays as it is.

        y = f(x W1) W2 = f(x W1 R) R' W2,    f(x R) = f(x) R,    R R' = 1,   R random

    Entries of turned weights are sums of many, so they look Gaussian, and the large channels of activations are spread
    over all: grids and trellises lose less. f may be a residual stream with RMSNorm, which does not notice turns (sums,
    products with numbers that all channels share), softmax weights times values within each head, inner products of
    queries and keys, or nothing. Gains of the norms are folded into the products behind them first, where that makes
    room: of a head that is tied to the embedding, which would have to be both turned and scaled, they cannot be. Give
    such a function a head of its own.

    Matrices are Hadamard's with random signs where the size allows, else orthogonal ones of Gaussians.

    Args:
        fn: (params, batch) -> anything; traced on the shapes of all batches, never run.
        params: a tree of arrays; leaves that are forms already stay as they are.
        calibration: batches; only shapes are looked at.
        rules: what will be compressed; channels that meet no such weight stay. Without any, all weights count.
        mask: as `lcq.quantize` has it; makes no difference here.
        key: of the random signs, a number or a key of jax.

    Returns:
        Parameters with which fn is the same up to rounding errors, and records: of gains that are folded, then of
        channels that are turned, or why not. `setting` is the kind of matrix; `before` and `after` are max |W| over
        the root of the mean square of W, the mean over the products that take part.

    Raises:
        ValueError: no batch, or leaves that are no arrays; names the leaf.

    Example:
        >>> import jax.numpy as jnp
        >>> def net(p, x):
        ...     return jax.nn.softmax(x @ x.T) @ (x @ p["v"]) @ p["o"]
        >>> params = {"v": jnp.eye(4), "o": jnp.eye(4)}
        >>> done = rotate(net, params, [jnp.ones((3, 4))])
        >>> jnp.abs(done.params["v"]).tolist()[0], jnp.allclose(done.params["v"] @ done.params["o"], jnp.eye(4)).item()
        ([0.5, 0.5, 0.5, 0.5], True)

    Source: Ashkboos et al., arXiv 2404.00456 (QuaRot), section 4 without the rotations of activations at run time.
    """
    del mask
    places = Places(fn, params, calibration, rules)
    key = jax.random.key(key) if isinstance(key, int | np.integer) else key
    values, folded = _folds(places)
    plain, turned = _found(places, {}), _found(places, values) if values else None
    if turned is None or _room(turned) <= _room(plain):
        values, folded, turned = {}, [], plain
    changing = dict.fromkeys(use.path for use in (*turned.uses, *places.found.uses))
    arrays = {path: places.scaled(path, values) for path in changing}
    records = [
        TransformRecord("rotate", *places.names(group), len(group.symbols), setting="gain folded") for group in folded
    ]
    for number, cell in enumerate(turned.cells):
        if any(places.weighs(use) for use in cell.uses):
            records.append(_turn(places, turned, cell, arrays, jax.random.fold_in(key, number)))
    made = []
    for path, leaf in places.leaves.items():
        dense = places.dense[path]
        changed = path in arrays and not np.array_equal(arrays[path], np.asarray(dense, np.float64), equal_nan=True)
        made.append(placed(nearest_number(arrays[path], dense.dtype), dense) if changed else leaf)
    return Transformed(jax.tree.unflatten(places.structure, made), tuple(records))


def _folds(places: Places) -> tuple[dict[int, float], list[Group]]:
    """Factors that make gains 1, and the groups whose factors these are."""
    values: dict[int, float] = {}
    folded = []
    for group in places.groups():
        gains = [use for use in group.producers if use.role == "gain"]
        if group.reason or len(gains) != 1 or any(use.role not in ("gain", "bias") for use in group.producers):
            continue
        (gain,) = gains
        symbols = places.found.symbols.roots(gain.above)
        sizes = np.asarray(places.dense[gain.path], np.float64).reshape(-1)[gain.places]
        if symbols.shape != sizes.shape or (sizes == 0).any() or (group.signed and (sizes < 0).any()):
            continue
        if any(use.role != "product" for use in group.consumers) or (sizes == sizes.flat[0]).all():
            continue
        found = dict(zip(symbols.reshape(-1).tolist(), (1 / sizes.reshape(-1)).tolist(), strict=True))
        values.update({symbol: found[symbol] for symbol in group.symbols.tolist() if symbol in found})
        folded.append(group)
    values, beyond = places.in_range(folded, values)
    return values, [group for i, group in enumerate(folded) if i not in beyond]


def _found(places: Places, values: dict[int, float]) -> Mixtures:
    """What can be turned with these factors applied."""
    roles: dict[str, set[str]] = {}
    for use in places.found.uses:
        roles.setdefault(use.path, set()).add(use.role)
    uniform = []
    for path, kinds in roles.items():
        if kinds <= {"gain", "other"}:
            leaf = np.asarray(nearest_number(places.scaled(path, values), places.dense[path].dtype)).reshape(-1)
            uniform += [path] if (leaf == leaf[:1]).all() else []
    return mixtures(
        places.fn, places.tree, *places.batches, unchanged=places.unchanged, stay=places.stay, uniform=uniform
    )


def _room(found: Mixtures) -> int:
    """How many coordinates can be turned."""
    return sum(len(cell.coordinates) for cell in found.cells if not cell.reason)


def _turn(
    places: Places, found: Mixtures, cell: Cell, arrays: dict[str, np.ndarray], key: jax.Array
) -> TransformRecord:
    made = [use for use in cell.uses if np.isin(found.mixing.symbols.find(use.above), cell.coordinates).any()]
    used = [use for use in cell.uses if np.isin(found.mixing.symbols.find(use.below), cell.coordinates).any()]
    producers, consumers = (tuple(dict.fromkeys(map(places.name, uses))) for uses in (made, used))
    reason = cell.reason or ("" if len(cell.uses) > 1 else "nothing takes the inverse up")
    if reason:
        return TransformRecord("rotate", producers, consumers, 0, reason)
    matrix, kind = orthogonal(len(cell.coordinates), key)
    before, after = [], []
    blocks = found.blocks(cell)
    for use, block in blocks:
        dtype = places.dense[use.path].dtype
        if np.abs(arrays[use.path].reshape(-1)[block] @ matrix).max() > float(jnp.finfo(dtype).max):
            reason = f"{use.path} would leave the range of {dtype}"
            return TransformRecord("rotate", producers, consumers, 0, reason)
    for use, block in blocks:
        flat = arrays[use.path].reshape(-1)
        before += [_peak(flat[block])] if use.role == "product" else []
        flat[block] = flat[block] @ matrix
        after += [_peak(flat[block])] if use.role == "product" else []
    size = len(cell.coordinates)
    one, two = float(np.mean(before)), float(np.mean(after))
    return TransformRecord("rotate", producers, consumers, size, "", kind, one, two)


def _peak(w: np.ndarray) -> float:
    """max |W| in units of the root of the mean square."""
    size = math.sqrt(float((w**2).mean()))
    return float(np.abs(w).max()) / size if size > 0 else 1.0
