"""What a function costs: the floating-point operations of its products."""

from typing import NamedTuple

from lcq.tracing.param_flow import trace
from lcq.tree.aliases import Batch, Function, Params
from lcq.tree.paths import flatten


class Flops(NamedTuple):
    """What one product costs.

    Attributes:
        path: Path of the parameter in the tree.
        kind: Kind of the product, "dot" or "conv".
        shape: Shape (G, M, N, n) of the product, see `lcq.tracing.im2col`.
        flops: Floating-point operations, 2 G M N n.
    """

    path: str
    kind: str
    shape: tuple[int, int, int, int]
    flops: int


def flops(fn: Function, params: Params, batch: Batch) -> list[Flops]:
    """Floating-point operations of every product of data with a parameter: 2 G M N n.

    Products under a scan are listed once for each of its rounds. Products of data with data (attention scores) or with
    what is computed from parameters (w * scale), and everything elementwise, are not counted.

    Args:
        fn: (params, batch) -> anything; traced, never run.
        params: a tree of arrays or shape structs.
        batch: a tree of arrays or shape structs.

    Raises:
        ValueError: a parameter goes into a while, a cond or a kernel, whose products cannot be seen.

    Example:
        >>> import jax.numpy as jnp
        >>> flops(lambda w, x: x @ w["kernel"], {"kernel": jnp.zeros((64, 10))}, jnp.zeros((2, 64)))
        [Flops(path='kernel', kind='dot', shape=(1, 2, 64, 10), flops=2560)]
    """
    program = trace(fn, params, batch, flatten(params)[0], strict=False)
    return [Flops(p.path, p.kind, p.shape, p.flops) for p in program.products]
