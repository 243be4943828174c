"""How far other numbers at one leaf move the outputs of a function."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lcq.forms.base import is_form
from lcq.forms.dtypes import wider
from lcq.ptq.batches import checked_batches, told_how_called
from lcq.tree.aliases import Batch, Function, Params
from lcq.tree.paths import flatten


class OutputError:
    """E = sum over outputs y of fn of ||y(w') - y(w)||^2 / ||y(w)||^2, over all batches.

    w' is w with other numbers at one leaf. Outputs are the floating-point leaves of what fn returns; one that is always
    zero is left out. They are kept for w, and fn is compiled once for each shape of a batch.

    Args:
        fn: (params, batch) -> a tree.
        params: w; of leaves that are forms already what they stand for.
        calibration: batches of inputs.

    Raises:
        ValueError: no batch, outputs without a floating-point number, all zero, or not finite.
    """

    def __init__(self, fn: Function, params: Params, calibration: Iterable[Batch]) -> None:
        leaves, structure = flatten(params)
        self._leaves = {path: leaf.dense() if is_form(leaf) else leaf for path, leaf in leaves.items()}
        self._batches = checked_batches(calibration)

        @jax.jit
        def outputs(values: Sequence[Any], batch: Batch) -> list[Array]:
            made = jax.tree.leaves(fn(jax.tree.unflatten(structure, values), batch))
            return [a.astype(wider(a.dtype, jnp.float32)) for a in map(jnp.asarray, made) if _is_inexact(a)]

        @jax.jit
        def squares(values: Sequence[Any], batch: Batch, given: Sequence[Array], sizes: Sequence[Any]) -> list[Array]:
            """||y(w') - y||^2 / s^2 of each output."""
            made = outputs(values, batch)
            return [(jnp.abs((a - b) / s) ** 2).sum() for a, b, s in zip(made, given, sizes, strict=True)]

        self._squares, values, given = squares, list(self._leaves.values()), []
        for batch in self._batches:
            with told_how_called(batch):
                given.append(outputs(values, batch))
        if not given[0]:
            raise ValueError("fn: expected a floating-point output, whose change is the error, got none; return logits")
        every = [[float(jnp.abs(a).max(initial=0)) for a in made] for made in given]
        for number, made in enumerate(every):
            if not np.isfinite(made).all():
                raise ValueError(
                    f"batch {number}: expected finite outputs of fn, got NaN or an infinity; drop it, or mend params"
                )
        most = np.max(every, 0)
        if not most.any():
            raise ValueError("fn: expected an output that is not always zero, got zeros alone; pass other batches")
        self._given = given
        self._sizes = [float(s) if s > 0 else math.inf for s in most]  # or squares could overflow
        self._norms = [
            sum(float((jnp.abs(a / s) ** 2).sum()) for a in output) or 1.0
            for output, s in zip(zip(*given, strict=True), self._sizes, strict=True)
        ]

    def __call__(self, path: str, dense: Array) -> float:
        """E with other numbers at one leaf."""
        values = list((self._leaves | {path: dense}).values())
        sums = np.zeros(len(self._norms))
        for batch, given in zip(self._batches, self._given, strict=True):
            sums += np.asarray(jax.device_get(self._squares(values, batch, given, self._sizes)), np.float64)
        return float((sums / self._norms).sum())


def _is_inexact(a: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(a), jnp.inexact)
