"""Training loops to copy: a plain one, the same for every optimizer, and one that goes from C step to C step."""

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Num, PyTree, Shaped

import lcq
from lcq.examples import data
from lcq.tree.aliases import Batch, Forms, OptState, Params


class Trained(NamedTuple):
    """What `train` returns: parameters, optimizer state, and the loss of the last batch."""

    params: Params
    opt_state: OptState
    loss: Any


class Score(NamedTuple):
    """Mean cross-entropy in nats, and the fraction of right answers."""

    loss: float
    accuracy: float


def train(
    loss: Callable[[Any, Any], Array],
    params: Params,
    tx: optax.GradientTransformation,
    batches: Iterable[Any],
    steps: int,
    *,
    opt_state: OptState = None,
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

    params = _copy(params)
    now = Trained(params, tx.init(params) if opt_state is None else _copy(opt_state), jnp.nan)
    return _run(_step(loss, tx), now, iter(batches), steps, on_step)


class LStep(NamedTuple):
    """What an L step came to: loss of its last batch at w, gap after the C step, and what `evaluate` said."""

    loss: float
    gap: float
    score: float


class Best(NamedTuple):
    """What `train_lc` returns: the best forms, the number of their L step, all L steps, and where training ended."""

    forms: Forms
    number: int
    history: list[LStep]
    last: Trained


def train_lc(
    loss: Callable[[Any, Any], Array],
    params: Params,
    tx: optax.GradientTransformation,
    batches: Iterable[Any],
    *,
    evaluate: Callable[[Any], Any],
    l_steps: int,
    every: int | tuple[int, int],
    stop_gap: float = 0.0,
    reset_momentum: bool = False,
) -> Best:
    """LC with the C steps made here: evaluates each Delta(Theta), keeps the best, stops when w has arrived.

    What is evaluated is what the C step puts into the state: `lcq.extract` makes the same one on a copy.

    Args:
        loss: (params, batch) -> scalar.
        params: a tree of arrays, trained already.
        tx: `lcq.lc(..., every=None)`; with every=None, schemes that are solved on the host work too.
        batches: enough for all L steps.
        evaluate: compressed tree -> number, such as the loss on held-back data; the least is the best.
        l_steps: at most how many.
        every: updates per L step, or (first, rest).
        stop_gap: stops after a C step with a gap no larger.
        reset_momentum: whether every L step starts from rest, see `without_momentum`.

    Raises:
        ValueError: too few batches, a score that is NaN, weights that are not finite, or C steps that `tx` makes.

    Example:
        >>> square = lambda params, batch: jnp.sum((params["w"] - batch) ** 2)
        >>> rules, mu = [lcq.Rule("w", lcq.KMeans(2))], lcq.geometric(0.1, 2.0, steps=9)
        >>> rate = per_l_step(optax.linear_schedule(0.2, 0.02, 20), 20)
        >>> tx = lcq.lc(optax.sgd, rules, mu=mu, every=None, learning_rate=rate)
        >>> w, goal = {"w": jnp.array([0.0, 1.0, 2.0, 5.0])}, jnp.array([0.0, 1.0, 6.0, 7.0])
        >>> score = lambda forms: square(lcq.decompress(forms), goal)
        >>> best = train_lc(square, w, tx, [goal] * 400, evaluate=score, l_steps=20, every=20, stop_gap=1e-6)
        >>> lcq.decompress(best.forms)["w"].round(2), len(best.history) < 20
        (Array([0.5, 0.5, 6.5, 6.5], dtype=float32), True)

    Source: the loop of Carreira-Perpinan & Idelbayev, arXiv 1707.04319, figure 1.
    """
    step, params, upcoming = _step(loss, tx), _copy(params), iter(batches)
    now = Trained(params, tx.init(params), jnp.nan)
    forms, best, history = None, 0, list[LStep]()
    first, rest = every if isinstance(every, tuple) else (every, every)
    for number in range(l_steps):
        now = _run(step, now, upcoming, rest if number else first, None)
        here = _extract(now)
        score = float(evaluate(here))
        opt_state = lcq.training.c_step(now.opt_state, now.params)
        is_at = lcq.metrics(opt_state)
        if int(is_at["c_steps"]) != number + 1:
            raise ValueError("C steps are made here and in update too: make tx by lcq.lc(..., every=None)")
        if math.isnan(score):
            raise ValueError(f"L step {number}: expected a number from evaluate, got NaN; use a smaller learning rate")
        if all(score < past.score for past in history):
            forms, best = here, number
        history.append(LStep(float(now.loss), float(is_at["gap"]), score))
        now = now._replace(opt_state=without_momentum(opt_state) if reset_momentum else opt_state)
        if history[-1].gap <= stop_gap:
            break
    return Best(forms, best, history, now)


def per_l_step(
    schedule: Callable[[Any], Any], every: int | tuple[int, int], *, factor: float = 1.0
) -> Callable[[Any], Array]:
    """A learning rate that starts again with every L step n, at update t_n: eta(t) = factor^n schedule(t - t_n).

    Args:
        schedule: of the number of updates since the L step began.
        every: updates per L step, or (first, rest), as for `lcq.lc` and `train_lc`.
        factor: of the rate from one L step to the next.

    Returns:
        A schedule for `lcq.lc(learning_rate=...)`.

    Example:
        >>> rate = per_l_step(lambda t: 0.5**t, (3, 2))
        >>> [float(rate(t)) for t in range(8)]
        [1.0, 0.5, 0.25, 1.0, 0.5, 1.0, 0.5, 1.0]
    """
    first, rest = every if isinstance(every, tuple) else (every, every)

    def rate(update: Any) -> Array:
        after = update - first
        since = jnp.where(after < 0, update, after % rest)
        return schedule(since) * factor ** jnp.where(after < 0, 0, after // rest + 1)

    return rate


def without_momentum(opt_state: OptState) -> Any:
    """The state of an optax optimizer with its running mean of gradients at zero: `trace` of SGD, `mu` of Adam.

    Momentum gathered in one L step pulls towards the Theta of that step. What else Adam keeps stays, its count of
    updates too, so that it takes up speed in about 1/(1 - b1) updates. A state without momentum is a ValueError.

    Example:
        >>> tx = optax.sgd(0.1, momentum=0.9)
        >>> _, state = tx.update(jnp.array(2.0), tx.init(jnp.array(0.0)))
        >>> state[0].trace, without_momentum(state)[0].trace
        (Array(2., dtype=float32...), Array(0., dtype=float32...))
    """

    def moves(node: Any) -> bool:
        return bool({"trace", "mu"} & set(getattr(node, "_fields", ())))

    def at_rest(node: Any) -> Any:
        mean = "trace" if "trace" in node._fields else "mu"
        return node._replace(**{mean: jax.tree.map(jnp.zeros_like, getattr(node, mean))})

    if not any(map(moves, jax.tree.leaves(opt_state, is_leaf=moves))):
        raise ValueError("expected an optimizer with momentum, got a state without `trace` or `mu`")
    return jax.tree.map(lambda node: at_rest(node) if moves(node) else node, opt_state, is_leaf=moves)


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

    def loss(params: Params, batch: Batch) -> Array:
        x, y = batch
        return optax.softmax_cross_entropy_with_integer_labels(apply(params, x), y).mean()

    return loss


def evaluate(
    apply: Callable[[Any, Any], Array],
    params: Params,
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
def _sums(apply: Callable[[Any, Any], Array], params: Params, x: Any, y: Any) -> Array:
    logits = apply(params, x)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
    return jnp.stack([losses.sum(), (logits.argmax(-1) == y).sum().astype(losses.dtype)])


def _step(loss: Callable[[Any, Any], Array], tx: optax.GradientTransformation) -> Callable[..., Trained]:
    """One update; parameters and state are donated."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Params, opt_state: OptState, batch: Batch) -> Trained:
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return Trained(optax.apply_updates(params, updates), opt_state, value)

    return step


def _run(step: Callable[..., Trained], now: Trained, upcoming: Iterator[Any], steps: int, on_step: Any) -> Trained:
    for number in range(1, steps + 1):
        batch = next(upcoming, None)
        if batch is None:
            raise ValueError(f"expected {steps} batches, got {number - 1}; lower the steps or see `endless`")
        now = step(now.params, now.opt_state, batch)
        if on_step is not None:
            on_step(number, now)
    return now


def _extract(now: Trained) -> Any:
    """Forms that outlive the next update; early ones are far from w, which is no news."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*away from the compressed ones", UserWarning)
        forms = lcq.extract(now.opt_state, now.params)
    return jax.tree.map(np.array, forms)  # copies, as biases are still the parameters themselves


def _copy(tree: PyTree) -> Any:
    return jax.tree.map(lambda a: jnp.array(a, copy=True), tree)
