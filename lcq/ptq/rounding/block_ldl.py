"""Block LDL: codes that need several weights at once, with feedback between blocks of inputs."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lcq.forms import Trellis
from lcq.ptq.rounding.base import ROUNDING_METHODS, ordered
from lcq.ptq.rounding.damped import Damped, damped_root, triangular
from lcq.ptq.rounding.paths import Blocks, descend, in_blocks
from lcq.ptq.rounding.refit import refitted
from lcq.ptq.rounding.sequential import Recursion, dot
from lcq.ptq.statistics import Statistics


class _Prepared(NamedTuple):
    recursion: Recursion
    gram: Array


@ROUNDING_METHODS.register("block_ldl")
@dataclasses.dataclass(frozen=True)
class BlockLDL(Damped):
    """Rounds block after block of inputs, as the least-squares weights ask for after the errors before it.

        v = argmin ||X w - Y v||^2 + delta ||v - w||^2
        q = argmin e'(H + delta I) e,    e = v - q,    over the codes of one block after another

    It is how a `Trellis` is rounded, whose path takes the codes of a block together: first with all inputs after the
    block free to follow, then, `sweeps` times, with all others as they are. No sweep raises that sum, nor do the scales
    that are fitted before each and at the end; see `lcq.ptq.rounding.paths` for what is exact in it. Of a codebook a
    block is a single weight, and there is no sweep: it is GPTQ on v.

    Attributes:
        damping: Damping delta in units of the mean of diag(H); above 0, for H may be singular.
        act_order: Whether inputs are rounded by decreasing H_tt, the largest first; paths have an order of their own.
        max_damping: Bound up to which damping may grow, tenfold each time, where H + delta I has no root in the
            precision at hand; `damping` itself, or less, allows no growth.
        follows: Whether X - Y counts; else v = w, as in GPTQ.
        block: Inputs of a path that are decided at a time.
        ahead: Inputs after these that a path is looked for in. The time is as (block + ahead) / block.
        sweeps: How often all blocks are looked at again, in the time of two searches each.
        refit: Whether the scales of paths are fitted by least squares instead of searched, where a neuron has its own.

    Raises:
        ValueError: damping not above 0; no root up to `max_damping`; no input in a block, or fewer than none ahead.

    Source: Tseng et al., QuIP#, arXiv 2402.04396, and QTIP, arXiv 2406.11235; v, looking ahead and sweeps are lcq's.
    """

    follows: bool = True
    block: int = 16
    ahead: int = 16
    sweeps: int = 4
    refit: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value, least in (("block", self.block, 1), ("ahead", self.ahead, 0), ("sweeps", self.sweeps, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"expected {name}= a whole number, at least {least}, got {value!r}")

    def prepare(self, w: Float[Array, "N n"], statistics: Statistics) -> _Prepared:
        statistics = statistics if self.follows else statistics._replace(drift=None)
        w, gram, drift, order, lives = ordered(w, statistics, self.act_order)
        mean = jnp.diagonal(gram).mean()
        root, damping = damped_root(gram, mean, lives, self.damping, self.max_damping)
        found, target = lives & jnp.isfinite(damping), w
        if drift is not None:
            solved = triangular(root, triangular(root, dot(drift, w), lower=True, trans=1), lower=True)
            target = w + jnp.where(found[:, None], solved, 0)
        inverse = jnp.where(found, 1 / jnp.diagonal(root), 0)
        more = jnp.where(jnp.isfinite(damping), damping, 1) * jnp.where(mean > 0, mean, 1)
        gram = gram + more * jnp.eye(len(gram), dtype=gram.dtype)
        return _Prepared(Recursion(order, target, target, root, inverse, damping), gram)

    def solve(self, prepared: _Prepared, form: Any, key: Array | None = None) -> Any:
        recursion, gram = prepared
        if not isinstance(form, Trellis):
            return super().solve(recursion, form, key)
        target, blocks = recursion.target, Blocks(self.block, self.ahead)
        pull = dot(gram, target)

        def fitted(form: Trellis) -> Any:
            return refitted(form, gram, pull) if self.fits(form) else form

        def sweep(turn: Array, form: Trellis) -> Any:
            return fitted(descend(target, gram, form, blocks, turn))

        return jax.lax.fori_loop(0, self.sweeps, sweep, fitted(in_blocks(target, recursion.feedback, form, blocks)))

    def fits(self, form: Any) -> bool:
        return self.refit and isinstance(form, Trellis) and form.scale.shape[-1] == form.shape[-1]

    def damped(self, prepared: _Prepared) -> Array:
        return super().damped(prepared.recursion)

    def on_paths(self) -> "BlockLDL":
        if self.act_order:
            raise ValueError(f"expected act_order=False, as paths have an order of their own, got {self}")
        return self
