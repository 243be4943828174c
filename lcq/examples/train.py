"""A plain training loop, the same for every optimizer: compression is in `tx`, not here."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Num, Shaped

import lcq
from lcq.examples import data


class Trained(NamedTuple):
    """What `train` returns: parameters, optimizer state, and the loss of the last batch."""

    params: Any
    opt_state: Any
    loss: Any


class Score(NamedTuple):
    """Mean cross-entropy in nats, and the fraction of right answers."""

    loss: float
    accuracy: float


def train(
    loss: Callable[[Any, Any], Array],
    params: Any,
    tx: optax.GradientTransformation,
    batches: Iterable[Any],
    steps: int,
    *,
    opt_state: Any = None,
    on_step: Callable[[int, Trained], None] | None = None,
) -> Trained:
    """Makes `steps` updates of params by tx, one batch each: w <- w + tx.update(grad loss(w, batch)).

    Parameters and state are donated to every update; the caller's arrays are copied first and stay valid.

    Args:
        loss: (params, batch) -> scalar.
        params: a tree of arrays.
        tx: any optax transformation, `lcq.lc(...)` included.
        batches: at least `steps` of them, all of the same shapes.
        steps: updates to make.
        opt_state: to go on from; default `tx.init(params)`.
        on_step: called after every update with its number, from 1, and what there is; its arrays die with the next.

    Raises:
        ValueError: fewer batches than steps.

    Example:
        >>> square = lambda params, batch: jnp.mean((params["w"] - batch) ** 2)
        >>> trained = train(square, {"w": jnp.array(0.0)}, optax.sgd(0.5), [jnp.array([1.0, 3.0])] * 2, 2)
        >>> trained.params
        {'w': Array(2., dtype=float32)}
    """

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, opt_state: Any, batch: Any) -> Trained:
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return Trained(optax.apply_updates(params, updates), opt_state, value)

    params = _copy(params)
    now = Trained(params, tx.init(params) if opt_state is None else _copy(opt_state), jnp.nan)
    upcoming = iter(batches)
    for number in range(1, steps + 1):
        batch = next(upcoming, None)
        if batch is None:
            raise ValueError(f"train wants {steps} batches; got {number - 1}; lower steps or see `endless`")
        now = step(now.params, now.opt_state, batch)
        if on_step is not None:
            on_step(number, now)
    return now


def endless(
    x: Num[np.ndarray, "n ..."], y: Shaped[np.ndarray, "n ..."], size: int, *, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Epoch after epoch of `data.batches`; never ends.

    Example:
        >>> x = np.zeros((10, 3))
        >>> [len(xs) for (xs, _), _ in zip(endless(x, x[:, 0], 4, seed=0), range(3))]
        [4, 4, 4]
    """
    epoch = 0
    while True:
        yield from data.batches(x, y, size, seed=seed, epoch=epoch)
        epoch += 1


def cross_entropy(apply: Callable[[Any, Any], Array]) -> Callable[[Any, Any], Array]:
    """The loss of a classifier for `train`: the mean over a batch (x, y) of -log softmax(apply(params, x))[y]."""

    def loss(params: Any, batch: Any) -> Array:
        x, y = batch
        return optax.softmax_cross_entropy_with_integer_labels(apply(params, x), y).mean()

    return loss


def evaluate(
    apply: Callable[[Any, Any], Array],
    params: Any,
    x: Num[np.ndarray, "n ..."],
    y: Shaped[np.ndarray, "n"],
    *,
    size: int = 1000,
) -> Score:
    """Loss and accuracy of a classifier on a whole data set.

    Args:
        apply: (params, x) -> logits.
        params: arrays, or a compressed tree: its forms are evaluated at Delta(Theta).
        x: inputs.
        y: labels.
        size: examples at a time.

    Returns:
        Means over the data set.
    """
    dense = lcq.decompress(params)
    parts = [_sums(apply, dense, x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]
    loss, right = np.sum(np.asarray(parts, np.float64), axis=0) / len(x)
    return Score(float(loss), float(right))


@functools.partial(jax.jit, static_argnums=0)
def _sums(apply: Callable[[Any, Any], Array], params: Any, x: Any, y: Any) -> Array:
    logits = apply(params, x)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
    return jnp.stack([losses.sum(), (logits.argmax(-1) == y).sum().astype(losses.dtype)])


def _copy(tree: Any) -> Any:
    return jax.tree.map(lambda a: jnp.array(a, copy=True), tree)
