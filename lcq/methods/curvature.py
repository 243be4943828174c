"""diag(H) of every product: how much the error of each weight changes the results."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lcq.dtypes import native_tree
from lcq.methods.walk import walk
from lcq.rules import Rule, flatten, resolve
from lcq.trace import trace


def curvature(
    fn: Callable[[Any, Any], Any], params: Any, batches: Iterable[Any], rules: Sequence[Rule], *, host: bool = True
) -> dict[str, Array]:
    """Weights for `lcq.compress(..., weights=)`: the mean square of the input that each weight multiplies.

        ||X w - X q||^2 / m = (w - q)' H (w - q) / m  ~  sum_t h_t (w_t - q_t)^2,    h = diag(X'X) / m

    That is half the second derivative of each product's squared error. Leaves in several products get the sum.

    Args:
        fn: (params, batch) -> anything, as for `lcq.quantize`.
        params: a tree of arrays.
        batches: unlabelled inputs of equal shapes, at least one.
        rules: which leaves.
        host: whether activations are kept in the host's memory.

    Returns:
        By path, an array of the leaf's shape.

    Raises:
        ValueError: as `lcq.quantize`; names the leaf.

    Example:
        >>> import lcq
        >>> w, rules = {"w": jnp.array([[0.9], [0.4]])}, [lcq.Rule("w", lcq.KMeans(1))]
        >>> h = curvature(lambda w, x: x @ w["w"], w, [jnp.array([[3.0, 1.0]])], rules)
        >>> h["w"].tolist(), f"{float(lcq.compress(w, rules, weights=h)['w'].levels[0, 0, 0]):.4f}"
        ([[9.0], [1.0]], '0.8500')

    Source: diagonal of the Hessian that GPTQ (arXiv 2210.17323) uses; Kim et al., arXiv 2306.07629, for codebooks.
    """
    batches, leaves = [native_tree(batch) for batch in batches], flatten(params)[0]
    if not batches:
        raise ValueError("wanted at least one batch of inputs; got none")
    chosen = [path for task in resolve(rules, params) for path in task.paths]
    program = trace(fn, params, batches[0], chosen)
    found = {path: np.zeros(np.shape(leaves[path]), np.float32) for path in chosen}
    for visit in walk(program, leaves, leaves, batches, host=host):
        product = visit.product
        squares: Any = 0.0
        for x, _ in visit.inputs:
            rows = product.inputs(jnp.asarray(x)).astype(jnp.float32)
            squares = squares + (rows**2).mean(1) / len(batches)
        places = np.asarray(product.weights(jnp.asarray(product.weight.elements(found[product.path].shape))))
        np.add.at(found[product.path].reshape(-1), places, np.asarray(squares)[:, :, None])
        visit.finish()
    return {path: jax.device_put(values) for path, values in found.items()}
