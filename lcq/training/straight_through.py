"""The straight-through estimator: the value of a projection with the gradient of its argument."""

import jax
from jaxtyping import Array, Float


def straight_through(w: Float[Array, "..."], projected: Float[Array, "..."]) -> Float[Array, "..."]:
    """The value of `projected` with the gradient of `w`: w + stop_gradient(projected - w), exactly `projected`.

    Source: Bengio, Leonard & Courville, arXiv 1308.3432.
    """
    return jax.lax.stop_gradient(projected) + (w - jax.lax.stop_gradient(w))
