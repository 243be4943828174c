"""Batch-norm statistics, re-estimated with compressed weights in place."""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from lcq.forms.dtypes import native_tree
from lcq.tree.aliases import Batch


def recalibrate_batch_norm(
    step: Callable[[PyTree, Batch], PyTree], statistics: PyTree, batches: Iterable[Batch]
) -> PyTree:
    """Batch-norm statistics of the compressed net: the mean of the statistics of single batches.

    Statistics belong to the weights they were gathered with; with Delta(Theta) in place of w they are wrong, and a deep
    net fails. Every running average s <- m s + (1 - m) b, whatever its momentum m, gives back the batch statistic b as
    step(0, batch) / (1 - m), with m = step(1, batch) - step(0, batch) seen on the first batch.

    Args:
        step: (statistics, batch) -> statistics after the training-mode forward pass of one batch, with the
            compressed parameters; jit it.
        statistics: a tree of running averages; its values do not matter.
        batches: training data, at least one batch; the larger the batches, the better the variances.

    Returns:
        A tree like `statistics`.

    Raises:
        ValueError: no batch; or `step` leaves a statistic as it is, so that the net is not in training mode.

    Example:
        >>> def step(statistics, x):
        ...     return {"mean": 0.75 * statistics["mean"] + 0.25 * x.mean(0)}
        >>> recalibrate_batch_norm(step, {"mean": jnp.zeros(2)}, [jnp.array([[1., 2.], [3., 4.]])])["mean"]
        Array([2., 3.], dtype=float32)
    """
    statistics = native_tree(statistics)
    zeros = jax.tree.map(jnp.zeros_like, statistics)
    total, share, count = zeros, None, 0
    for batch in batches:
        batch = native_tree(batch)
        from_zero = step(zeros, batch)
        if share is None:
            from_one = step(jax.tree.map(jnp.ones_like, statistics), batch)
            share = jax.tree.map(lambda one, zero: 1 - (one - zero).mean(), from_one, from_zero)
            still = [str(path) for path, s in jax.tree_util.tree_leaves_with_path(share) if not float(s) > 0]
            if still:
                raise ValueError(f"step leaves {', '.join(still)} as they are: run the forward pass in training mode")
        total = jax.tree.map(jnp.add, total, from_zero)
        count += 1
    if not count:
        raise ValueError("expected at least one batch, got none")
    return jax.tree.map(lambda t, s: t / (s * count), total, share)
