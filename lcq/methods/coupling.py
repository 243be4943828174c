"""How the L step ties w to Delta(Theta): penalty weights, the coupling gradient, and the proximal pull.

    L step   w <- argmin L(w) + mu/2 ||w - t||^2,   t = Delta(Theta) + lambda/mu

Functions on arrays; `lc` applies them to the selected leaves of a tree.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

@dataclasses.dataclass(frozen=True)
class Geometric:
    """The penalty weights mu_k = start * factor^min(k, steps). See `geometric`."""

    start: float
    factor: float
    steps: int

    def at(self, k: Any) -> Array:
        """mu_k as float32."""
        k = jnp.minimum(k, self.steps).astype(jnp.float32)
        return jnp.float32(self.start) * jnp.exp(k * jnp.float32(math.log(self.factor)))


def geometric(start: float, factor: float, *, steps: int) -> Geometric:
    """A penalty schedule mu_k = start * factor^min(k, steps), k counting C steps.

    A value, not a function, so that wrappers which trace callables (`optax.inject_hyperparams`) leave it alone; constant
    after `steps`, because a factor above 1 overflows float32 in the end.

    Args:
        start: mu of the first L step, > 0; 1e-4 to 1e-3 is usual. Too large and w sticks at direct compression.
        factor: > 0; 1.1 to 1.4 is usual.
        steps: C steps until mu stays as it is.

    Raises:
        ValueError: not positive and finite, or a last mu beyond 1e30.

    Example:
        >>> float(geometric(0.5, 2.0, steps=3).at(jnp.int32(10)))
        4.0
    """
    if not (0 < start < math.inf and 0 < factor < math.inf and steps >= 0):
        raise ValueError(f"wanted start > 0, factor > 0, steps >= 0; got {start}, {factor}, {steps}")
    if math.log(start) + steps * math.log(factor) > math.log(1e30):
        raise ValueError(f"mu would grow to {start} * {factor}^{steps}, beyond float32; fewer steps or a smaller factor")
    return Geometric(float(start), float(factor), int(steps))


_SETTLE = 1 << 14
"""Updates after which an optimizer under a constant gradient must have settled; enough for momentum .999."""


def gradient(
    w: Float[Array, "*leaf"], delta: Float[Array, "*leaf"], lagrange: Float[Array, "*leaf"] | None, mu: Any
) -> Float[Array, "*leaf"]:
    """Gradient of the coupling mu/2 ||w - Delta - lambda/mu||^2: mu (w - Delta) - lambda."""
    pull = mu * (w - delta)
    return pull if lagrange is None else pull - lagrange


def proximal(
    v: Float[Array, "*leaf"], delta: Float[Array, "*leaf"], lagrange: Float[Array, "*leaf"] | None, mu: Any, s: Any
) -> Float[Array, "*leaf"]:
    """The proximal step (v + s mu t)/(1 + s mu) from v, the result of the inner optimizer, to t = Delta + lambda/mu.

    Its fixed point is the minimiser of L(w) + mu/2 ||w - t||^2 if s is the step per unit of gradient that the inner
    optimizer makes in the long run.
    """
    target = mu * delta if lagrange is None else mu * delta + lagrange
    return (v + s * target) / (1 + s * mu)


def linear_step(inner: Callable[[Any], optax.GradientTransformation]) -> Callable[[Any, Any], Any]:
    """s(eta) of an optimizer that is linear in the gradient, found by giving it a constant gradient.

    s/eta = lim_t -u_t / g: 1 for SGD, 1/(1 - beta) for momentum.

    Raises:
        ValueError: the updates do not settle, or do not double with the gradient.
    """

    def limit(g: float) -> tuple[float, float]:
        tx = inner(jnp.float32(1.0))
        params = jnp.zeros([])

        def step(_: Any, carry: Any) -> Any:
            before, _, state = carry
            u, state = tx.update(jnp.float32(g), state, params)
            return u, before, state

        u, before, _ = jax.lax.fori_loop(0, _SETTLE, step, (params, params, tx.init(params)))
        return float(-u) / g, float(jnp.abs(u - before) / jnp.maximum(jnp.abs(u), 1e-30))

    with jax.ensure_compile_time_eval():
        (small, unsettled), (large, _) = limit(1.0), limit(2.0)
    if not (small > 0 and unsettled < 1e-4 and abs(large / small - 1) < 1e-3):
        raise ValueError(
            "coupling='proximal' finds the step size of optimizers linear in the gradient only; pass coupling="
            "lcq.adam_step(b2, eps) for Adam, a function (inner state, learning rate) -> step, or coupling='gradient'"
        )
    return lambda inner_state, eta: eta * small


def adam_step(b2: float = 0.999, eps: float = 1e-8) -> Callable[[Any, Any], Any]:
    """Step per unit of gradient of Adam, s = eta / (sqrt(nu / (1 - b2^t)) + eps), for `lc(coupling=...)`.

    Args:
        b2: decay of the second moment, as given to the optimizer.
        eps: as given to the optimizer.
    """

    def step(inner_state: Any, eta: Any) -> Any:
        nu = optax.tree.get(inner_state, "nu")
        count = optax.tree.get(inner_state, "count", filtering=lambda path, _: "ScaleByAdamState" in str(path[-1]))
        correction = 1 - b2 ** count.astype(jnp.float32)
        return jax.tree.map(lambda n: eta / (jnp.sqrt(n / correction) + eps), nu)

    return step
