"""diag(H) of every product: how much the error of each weight changes the results."""

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from lcq.ptq.batches import Mask, checked_batches, traced
from lcq.ptq.gathering import squares
from lcq.ptq.two_stream import walk
from lcq.tracing.program import Program
from lcq.tree.aliases import Batch, Function, Params
from lcq.tree.paths import flatten
from lcq.tree.rules import Rules, resolve


def curvature(
    fn: Function,
    params: Params,
    calibration: Iterable[Batch],
    rules: Rules,
    *,
    mask: Mask = None,
    offload: bool = True,
) -> dict[str, Array]:
    """The mean square of the input that each weight multiplies, for `lcq.compress(..., importance=)`.

        ||X w - X q||^2 / m = (w - q)' H (w - q) / m  ~  sum_t h_t (w_t - q_t)^2,    h = diag(X'X) / m

    That is half the second derivative of each product's squared error. Leaves in several products get the sum;
    an expert without a row gets 0.

    Args:
        fn: (params, batch) -> anything, as for `lcq.quantize`.
        params: a tree of arrays.
        calibration: batches of unlabelled inputs of any shapes, at least one.
        rules: which leaves.
        mask: which positions of a batch count, see `lcq.quantize`.
        offload: whether activations are kept in the host's memory.

    Returns:
        By path, an array of the leaf's shape.

    Raises:
        ValueError: as `lcq.quantize`; names the leaf.

    Example:
        >>> import lcq, jax.numpy as jnp
        >>> w, rules = {"w": jnp.array([[0.9], [0.4]])}, [lcq.Rule("w", lcq.KMeans(1))]
        >>> h = curvature(lambda w, x: x @ w["w"], w, [jnp.array([[3.0, 1.0]])], rules)
        >>> h["w"].tolist(), f"{float(lcq.compress(w, rules, importance=h)['w'].levels[0, 0, 0]):.4f}"
        ([[9.0], [1.0]], '0.8500')

    Source: diagonal of the Hessian that GPTQ (arXiv 2210.17323) uses; Kim et al., arXiv 2306.07629, for codebooks.
    """
    batches, leaves = checked_batches(calibration), flatten(params)[0]
    chosen = [path for task in resolve(rules, params) for path in task.paths]
    programs, inputs = traced(fn, params, batches, chosen, mask)
    numbers = {program: _ordinals(program) for program in programs}
    sums: dict[Any, Any] = {}
    for visit in walk(programs, leaves, leaves, inputs, together=False, offload=offload):
        (use,) = visit.uses
        product = use.product
        square, many = squares(use)
        key = product.path, numbers[programs[use.batches[0]]][product.number]
        before = sums.get(key, (product, 0.0, 0))
        sums[key] = (before[0], before[1] + np.asarray(square), before[2] + np.asarray(many))
        visit.finish()
    found = {path: np.zeros(np.shape(leaves[path]), np.float32) for path in chosen}
    for product, square, many in sums.values():
        mean = square / np.maximum(many, 1)[:, None]
        places = product.places(found[product.path].shape)
        np.add.at(found[product.path].reshape(-1), places, mean[:, :, None])
    return {path: jax.device_put(values) for path, values in found.items()}


def _ordinals(program: Program) -> dict[int, int]:
    """Which product of its leaf each is."""
    seen: dict[str, int] = {}
    found = {}
    for product in program.products:
        found[product.number] = seen[product.path] = seen.get(product.path, -1) + 1
    return found
