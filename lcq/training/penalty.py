"""How the L step ties w to Delta(Theta): the coupling, its gradient, the proximal pull.

    L step   w <- argmin L(w) + mu/2 ||w - t||^2,   t = Delta(Theta) + lambda/mu

Functions on arrays; `lc` applies them to the selected leaves of a tree.
"""

import contextlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from lcq.forms.dtypes import own_promotion

_SETTLE = 1 << 13
"""Updates in which an optimizer under a constant gradient settles to 1e-3; enough for momentum .999."""


def gradient(
    w: Float[Array, "*leaf"],
    delta: Float[Array, "*leaf"],
    multiplier: Float[Array, "*leaf"] | None,
    mu: Float[Array, ""] | float,
) -> Float[Array, "*leaf"]:
    """Gradient of the coupling mu/2 ||w - Delta - lambda/mu||^2: mu (w - Delta) - lambda."""
    pull = mu * (w - delta)
    return pull if multiplier is None else pull - multiplier


def penalty(
    w: Float[Array, "*leaf"],
    delta: Float[Array, "*leaf"],
    multiplier: Float[Array, "*leaf"] | None,
    mu: Float[Array, ""] | float,
) -> Float[Array, ""]:
    """The coupling itself, mu/2 ||w - Delta - lambda/mu||^2 >= 0; `gradient` is its gradient."""
    away = w - delta if multiplier is None else w - delta - multiplier / mu
    return 0.5 * mu * jnp.sum(away**2)


def proximal(
    v: Float[Array, "*leaf"],
    delta: Float[Array, "*leaf"],
    multiplier: Float[Array, "*leaf"] | None,
    mu: Float[Array, ""] | float,
    s: Array | float,
) -> Float[Array, "*leaf"]:
    """The proximal step w = (v + s mu t)/(1 + s mu) from v, the inner optimizer's result, to t = Delta + lambda/mu.

    Where w stays as it is, v = w - s dL/dw gives dL/dw + mu (w - t) = 0: the minimiser of the L step, if s is the
    step per unit of gradient that the inner optimizer makes in the long run.
    """
    target = mu * delta if multiplier is None else mu * delta + multiplier
    return (v + s * target) / (1 + s * mu)


@own_promotion()
def linear_step(inner: Callable[[Array], optax.GradientTransformation]) -> Callable[[PyTree, Array], Array]:
    """s(inner state, eta) of an optimizer that is linear in the gradient, found by giving it a constant one.

    s/eta = lim_t -u_t / g: 1 for SGD, 1/(1 - beta) for `optax.sgd` with momentum, Nesterov or not.

    Raises:
        ValueError: -u_t/g does not settle, or depends on g.
    """

    def per_gradient(g: Float[Array, ""]) -> Float[Array, "2"]:
        tx = optax.with_extra_args_support(inner(jnp.float32(1.0)))
        w = jnp.zeros([])

        def step(_: Array, carry: PyTree) -> PyTree:
            return tx.update(g, carry[1], w)

        half = jax.lax.fori_loop(0, _SETTLE, step, (w, tx.init(w)))
        full = jax.lax.fori_loop(0, _SETTLE, step, half)
        return jnp.stack([-half[0] / g, -full[0] / g])

    linear = False
    with jax.ensure_compile_time_eval(), contextlib.suppress(TypeError):  # one that wants a value= is not
        found = jax.vmap(per_gradient)(jnp.array([1.0, 1e-3, 1e3]))
        slope = float(found[0, 1])
        linear = slope > 0 and bool((abs(found / slope - 1) < 1e-3).all())
    if not linear:
        raise ValueError(
            "coupling='proximal' finds the step size of optimizers that are linear in the gradient, as SGD with "
            "momentum, got one that is not: for Adam pass coupling=lcq.training.adam_step(b2, eps), for others a "
            "function (inner state, learning rate) -> step, or coupling='gradient'"
        )
    return lambda inner_state, eta: eta * slope


def adam_step(b2: float = 0.999, eps: float = 1e-8) -> Callable[[PyTree, Array], PyTree]:
    """Adam's step per unit of gradient, s = eta / (sqrt(nu / (1 - b2^t)) + eps), for `lc(coupling=...)`.

    Args:
        b2: decay of the second moment, as given to the optimizer.
        eps: as given to the optimizer.

    Raises:
        ValueError: when used, if the optimizer's state has no `optax.ScaleByAdamState`, or several.
    """

    def step(inner_state: PyTree, eta: ArrayLike) -> PyTree:
        nodes = jax.tree.leaves(inner_state, is_leaf=_is_adam)
        found = [node for node in nodes if _is_adam(node)]
        if len(found) != 1:
            raise ValueError(
                f"coupling=adam_step(...) wants one optax.ScaleByAdamState in the inner optimizer's state, "
                f"got {len(found)}; pass a function (inner state, learning rate) -> step instead"
            )
        correction = 1 - b2 ** found[0].count.astype(jnp.float32)
        return jax.tree.map(lambda nu: eta / (jnp.sqrt(nu.astype(jnp.float32) / correction) + eps), found[0].nu)

    return step


def _is_adam(node: PyTree) -> bool:
    return isinstance(node, optax.ScaleByAdamState)
