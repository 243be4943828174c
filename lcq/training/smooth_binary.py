"""Binary weights by a smooth transformation of groups of real ones, trained by plain backpropagation.

What is published (Shulman, arXiv 2107.01400, its abstract): the binary state of a weight vector is approximated by a
deterministic, differentiable transformation of real parameters; gradients are those of the transformation, with no
straight-through estimator, no saturating non-linearity added to the net and no auxiliary loss; momentum SGD with large
learning rates and L2, as for the float net. The formula was not available: `GroupPower` is lcq's reconstruction, with
these properties. The other transformations are controls, with the same signature, (w, t, group) -> W.
"""

import abc
import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from lcq.forms import Codes
from lcq.forms.base import Form
from lcq.forms.blocks import Per, block_counts, blocks, compute_dtype
from lcq.forms.validate import named
from lcq.schemes.levels import Binary
from lcq.training.given import abstract
from lcq.training.straight_through import straight_through
from lcq.tree.aliases import Forms, Leaves, Params
from lcq.tree.compress import check_finite
from lcq.tree.paths import flatten
from lcq.tree.rules import Rule, Rules, checked, resolve

Axes = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Binarization(abc.ABC):
    """Weights on their way to two values a group: W = alpha_G b(w; t), in the end alpha_G sign(x).

    x = w - mean_G w, or w itself where `centred` is false; sign(0) = +1.

    Attributes:
        alpha: "mean", mean_G |x|; or "constant", sqrt(2 / fan_in), where the inputs of an output are all axes of a
            kernel but the last, for nets whose batch norm sets the scale. The mean follows the scale of w, which a b of
            standardised groups does not depend on: so that scale is a parameter of alpha alone.

    Source: the mean: Rastegari et al., arXiv 1603.05279; the constant: McDonnell, arXiv 1802.08530.
    """

    alpha: str = "mean"

    def __post_init__(self) -> None:
        if self.alpha not in ("mean", "constant"):
            raise ValueError(f"expected alpha='mean' or 'constant', got {self.alpha!r}; pass a learned one to the call")

    @property
    def centred(self) -> bool:
        """Whether x is w less its group's mean."""
        return True

    @abc.abstractmethod
    def weights(self, x: Array, alpha: Array, t: Array, axes: Axes) -> Array:
        """W of x in float32 or wider; a group runs along `axes`, and alpha broadcasts against x."""

    def scale(self, x: Array, fan_in: int, axes: Axes) -> Array:
        """alpha, to broadcast against x."""
        if self.alpha == "mean":
            return jnp.mean(jnp.abs(x), axes, keepdims=True)
        return jnp.full((1,) * x.ndim, math.sqrt(2 / fan_in), x.dtype)

    def __call__(
        self, w: Float[Array, "..."], t: ArrayLike, group: Per = None, alpha: Float[Array, "..."] | None = None
    ) -> Float[Array, "..."]:
        """W = alpha_G b(w; t), in w's dtype.

        Args:
            w: weights, the outputs last.
            t: progress from 0 to 1, a number or a traced scalar; beyond them it counts as they do.
            group: what makes a group, see `lcq.forms.blocks.block_counts`: None, all of w; "channel", an
                output's weights.
            alpha: one number a group, in place of the setting's: a learned one.
        """
        x, axes, own = self._split(w, group, alpha)
        t = jnp.clip(jnp.asarray(t, x.dtype), 0, 1)
        return self.weights(x, own, t, axes).reshape(w.shape).astype(w.dtype)

    def project(self, w: Float[Array, "..."], group: Per = None, alpha: Float[Array, "..."] | None = None) -> Codes:
        """What is deployed, alpha_G sign(x): signs of 1 bit, and one number a group, or for all if it is constant."""
        x, _, own = self._split(w, group, alpha)
        numbers = own.reshape((1,) * w.ndim if own.size == 1 else block_counts(group, w.shape))
        return Codes((x >= 0).astype(jnp.uint8).reshape(w.shape), None, numbers, None, (-1.0, 1.0), dtype=str(w.dtype))

    def _split(self, w: Array, group: Per, alpha: Array | None) -> tuple[Array, Axes, Array]:
        """x with axes that run inside of groups, these axes, and alpha."""
        counts = block_counts(group, w.shape)
        cut = blocks(w.shape, counts)
        x = w.astype(compute_dtype(w.dtype)).reshape(cut.split)
        if self.centred:
            one = x[tuple(slice(1) if axis in cut.axes else slice(None) for axis in range(x.ndim))]
            x = x - jax.lax.stop_gradient(one)  # equal weights become zeros, not what rounding leaves
            x = x - x.mean(cut.axes, keepdims=True)
        if alpha is None:
            return x, cut.axes, self.scale(x, math.prod(w.shape[:-1]), cut.axes)
        if alpha.shape != counts:
            raise ValueError(f"expected alpha {list(counts)}, one number a group, got {list(alpha.shape)}")
        return x, cut.axes, alpha.astype(x.dtype).reshape(cut.stat)


def _standardised(x: Array, axes: Axes, guard: float) -> Array:
    return x / jnp.sqrt(jnp.mean(x * x, axes, keepdims=True) + guard)


@dataclasses.dataclass(frozen=True)
class GroupPower(Binarization):
    """Signed powers of a standardised group, of an exponent that falls from 1 to nearly 0.

        u   = x / sqrt(mean_G x^2 + guard),    x = w - mean_G w
        phi = u (u^2 + e^2)^((p - 1)/2)
        p   = 1 - (1 - least) t / settled,    e = width         until t = settled; from there both fall geometrically,
        p   = least last^s,    e = width last^s,    s = (t - settled) / (1 - settled)
        b   = phi / sqrt(mean_G phi^2 + guard),    W = alpha_G b

    At t = 0 b is the standardised group; at p = 0 and e = 0 it would be binary. All along b has mean square 1,
    sign(b) = sign(x), and neither a shift nor a positive scale of w matters. A group of two is binary at every t. In
    a group of equal weights, or of one, b = 0, though sign(0) = +1 is deployed. Gradients are finite everywhere, but in
    a group of nearly equal weights as large as its spread is small: start from weights that differ.

    Attributes:
        least: Exponent p at progress `settled`.
        settled: Progress at which p reaches `least`. At this one normally distributed weights have a
            deviation of .023, by far most of it from weights within the width.
        width: Initial e: within it of 0, in standard deviations of the group, phi is linear. Weights that stay there
            are neither -1 nor 1, and nets make use of that.
        last: Factor of p and e at the end, which leaves no room within the width.
        guard: Constant that keeps equal weights from 0/0; groups of a variance far above it do not see it.

    Example:
        >>> w = jnp.array([-3.0, -1.0, 1.0, 3.0])
        >>> (10 * jnp.stack([GroupPower()(w, t) for t in (0.0, 0.4, 1.0)])).round()
        Array([[-27.,  -9.,   9.,  27.],
               [-25., -14.,  14.,  25.],
               [-20., -20.,  20.,  20.]], dtype=float32)

    Source: lcq's, with the properties that the abstract of Shulman, arXiv 2107.01400, states.
    """

    least: float = 0.02
    settled: float = 0.8
    width: float = 0.03
    last: float = 0.03
    guard: float = 1e-10

    def __post_init__(self) -> None:
        super().__post_init__()
        parts = 0 < self.least <= 1 and 0 < self.last <= 1 and 0 < self.settled <= 0.999
        if not (parts and self.last * self.width >= 1e-12 and 1e-30 <= self.guard < math.inf):
            raise ValueError(
                "expected 0 < least, last <= 1, 0 < settled <= .999, last width >= 1e-12, and guard >= 1e-30, which "
                f"float32 can work with, got {self}"
            )

    def weights(self, x: Array, alpha: Array, t: Array, axes: Axes) -> Array:
        u = _standardised(x, axes, self.guard)
        fall = self.last ** jnp.maximum(0, (t - self.settled) / (1 - self.settled))
        p = 1 - (1 - self.least) * jnp.minimum(1, t / self.settled) - self.least * (1 - fall)
        phi = u * jnp.exp((p - 1) / 2 * jnp.log(u * u + (self.width * fall) ** 2))
        return alpha * _standardised(phi, axes, self.guard)


@dataclasses.dataclass(frozen=True)
class StraightSign(Binarization):
    """Signs from the start, a control: W = alpha_G sign(x), with the gradient as if W were x.

    StraightSign("constant") is the plain straight-through sign, StraightSign() a binary weight network, and either may
    have its groups centred. t does not matter.

    Attributes:
        centres: Whether x is w less its group's mean.

    Example:
        >>> w = jnp.array([-3.0, 1.0, 5.0])
        >>> StraightSign()(w, 0.0), StraightSign(centres=True)(w, 0.0)
        (Array([-3.,  3.,  3.], dtype=float32), Array([-2.6666667,  2.6666667,  2.6666667], dtype=float32))

    Source: Courbariaux et al., arXiv 1511.00363; the mean: Rastegari et al., arXiv 1603.05279; centred: Qin et al.,
    arXiv 1909.10788.
    """

    centres: bool = False

    @property
    def centred(self) -> bool:
        return self.centres

    def scale(self, x: Array, fan_in: int, axes: Axes) -> Array:
        return jax.lax.stop_gradient(super().scale(x, fan_in, axes))  # W stands for x, its scale included

    def weights(self, x: Array, alpha: Array, t: Array, axes: Axes) -> Array:
        del t, axes
        signs = jnp.where(x >= 0, 1, -1).astype(x.dtype)
        return straight_through(x, alpha * signs) + (alpha - jax.lax.stop_gradient(alpha)) * signs


@dataclasses.dataclass(frozen=True)
class AnnealedTanh(Binarization):
    """A hyperbolic tangent that becomes steep, a control: W = alpha_G tanh(beta u), u the standardised group.

        u = x / sqrt(mean_G x^2 + guard),    beta = steepest^min(1, t / settled)

    Its gradients vanish where it saturates, unlike those of `GroupPower`.

    Attributes:
        steepest: beta at the end; it starts at 1.
        settled: Progress from which on beta is `steepest`.
        guard: Constant that keeps equal weights from 0/0.

    Example:
        >>> AnnealedTanh()(jnp.array([-3.0, -1.0, 1.0, 3.0]), 1.0)
        Array([-2., -2.,  2.,  2.], dtype=float32)

    Source: continuation by tanh(beta x): Cao et al., arXiv 1702.00758.
    """

    steepest: float = 100.0
    settled: float = 0.8
    guard: float = 1e-10

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (1 <= self.steepest <= 1e30 and 0 < self.settled <= 1 and 1e-30 <= self.guard < math.inf):
            raise ValueError(f"expected 1 <= steepest <= 1e30, 0 < settled <= 1 and guard >= 1e-30, got {self}")

    def weights(self, x: Array, alpha: Array, t: Array, axes: Axes) -> Array:
        beta = self.steepest ** jnp.minimum(1, t / self.settled)
        return alpha * jnp.tanh(beta * _standardised(x, axes, self.guard))


_Binarize = Callable[[Array, Per, Array | None], Array | Form]
"""(w, group, alpha) -> what takes the place of w."""


@dataclasses.dataclass(frozen=True)
class SmoothBinary:
    """A binarization of the leaves that rules select, see `smooth_binary`. It holds settings only."""

    rules: tuple[Rule, ...]
    binarization: Binarization

    def __call__(self, params: Params, t: ArrayLike, alphas: Leaves | None = None) -> Params:
        """The tree with W in place of w at the selected leaves.

        Args:
            params: real weights w; shape structs give shape structs, here and in the other functions.
            t: progress of the training from 0 to 1, a number or a traced scalar.
            alphas: learned ones, see `alphas`.

        Raises:
            ValueError: a number t outside of 0 to 1; a rule without a leaf, or groups that do not fit one.
        """
        if isinstance(t, int | float) and not 0 <= t <= 1:
            raise ValueError(f"expected t, progress from 0 to 1, got {t}; pass the step over the number of steps")
        return self._put(params, alphas, lambda w, group, alpha: self.binarization(w, t, group, alpha))

    def compress(self, params: Params, alphas: Leaves | None = None) -> Forms:
        """What is deployed: the tree with forms of alpha_G sign(x), working layout, at the selected leaves.

        It may be traced; `lcq.extract(binary, params)` is the packed tree for a file. With batch norm,
        `lcq.recalibrate_batch_norm` afterwards.

        Raises:
            ValueError: a NaN or an infinity; names the leaf.
        """
        leaves, _ = flatten(params)
        for task in resolve(self.rules, params):
            if not abstract(leaves[task.name]):
                check_finite(task.name, leaves[task.name])
        return self._put(params, alphas, self.binarization.project)

    def deviation(self, params: Params, t: ArrayLike) -> Leaves:
        """How far W is from binary, by path and for each group: mean_G b^4 / (mean_G b^2)^2 - 1.

        Zero just where all |b| of a group are equal, and else positive; -1 for a group of b = 0. (Of `GroupPower`
        mean_G b^2 is 1.) The largest is small before the end, or what is deployed is not what was trained.
        """

        def deviation(w: Array, group: Per, _: Array | None) -> Array:
            counts = block_counts(group, w.shape)
            cut = blocks(w.shape, counts)
            wide = w.astype(compute_dtype(w.dtype))
            b = self.binarization(wide, t, group, jnp.ones(counts, wide.dtype)).reshape(cut.split)
            second, fourth = (jnp.mean(b**n, cut.axes).reshape(counts) for n in (2, 4))
            return fourth / jnp.maximum(second**2, jnp.finfo(b.dtype).tiny) - 1

        leaves, _ = flatten(self._put(params, None, deviation))
        return {path: leaves[path] for path in self._paths(params)}

    def alphas(self, params: Params) -> Leaves:
        """An alpha for every group of every selected leaf, by path, to be trained beside the parameters.

        They start at what the setting gives. Give the optimizer both, as {"params": params, "alphas": alphas}, and keep
        alphas out of L2.
        """

        def start(w: Array, group: Per, _: Array | None) -> Array:
            scale = self.binarization.project(w, group).scale
            return jnp.broadcast_to(scale, block_counts(group, w.shape))

        leaves, _ = flatten(self._put(params, None, start))
        return {path: leaves[path] for path in self._paths(params)}

    def _paths(self, params: Params) -> list[str]:
        return [task.name for task in resolve(self.rules, params)]

    def _put(self, params: Params, alphas: Leaves | None, f: _Binarize) -> Forms:
        """The tree with f(w, group, alpha) at the selected leaves; of shape structs, the shapes of it."""
        if abstract(params):
            return jax.eval_shape(lambda params, alphas: self._put(params, alphas, f), params, alphas)
        tasks = resolve(self.rules, params)
        leaves, structure = flatten(params)
        if alphas is not None and set(alphas) != {task.name for task in tasks}:
            wrong = sorted(set(alphas) ^ {task.name for task in tasks})
            raise ValueError(f"expected alphas of the selected leaves, got more or fewer: {', '.join(wrong)}")
        for task in tasks:
            path, alpha = task.name, None if alphas is None else alphas[task.name]
            assert isinstance(task.scheme, Binary)
            with named(path):
                mapped = _stacked(f, task.scheme.per, task.stacked)
                leaves[path] = mapped(jnp.asarray(leaves[path]), alpha)
        return jax.tree.unflatten(structure, leaves.values())


def _stacked(f: _Binarize, group: Per, stacked: int) -> Callable[[Array, Array | None], Array | Form]:
    """f(., group, .), mapped over the leading axes."""
    if not stacked:
        return lambda w, alpha: f(w, group, alpha)
    return jax.vmap(_stacked(f, group, stacked - 1))


def smooth_binary(rules: Rules, binarization: Binarization | None = None) -> SmoothBinary:
    """Trains binary weights as smooth functions of real ones, and gives the forms that are left of them.

        minimise over w:  L(alpha_G b(w; t)),    t from 0 to 1;    deploy  alpha_G sign(w - mean_G w)

    The transformation is applied inside the loss, to the parameters a net is called with; gradients reach w by plain
    backpropagation, and any optax optimizer moves it. Momentum SGD, large learning rates and L2 suit it: b does not
    depend on the scale of w, and L2 keeps w from growing and its steps from becoming small. What is in no rule, such as
    biases and batch norm, trains on as it is. Layers with binary activations take the weights as they come with
    `binarize_kernel=False`, see `lcq.layers.linen`.

    Args:
        rules: which leaves; `lcq.Binary(per=...)` says what makes a group: "channel", an output's weights or a filter;
            None, all of the leaf. Stacked leaves are taken apart.
        binarization: the transformation, `GroupPower()` by default; `StraightSign` and `AnnealedTanh` are controls.

    Returns:
        binary(params, t): the tree to call the net with; lcq.extract(binary, params): what is deployed, forms of 1 bit
        a weight; binary.deviation(params, t): how far W is from that; binary.alphas(params): scales, if they are
        learned.

    Raises:
        ValueError: no rule, or one with another scheme, or a joint one; what is no binarization.

    Example:
        >>> import lcq
        >>> rules = [lcq.Rule("kernel", lcq.Binary(per="channel"))]
        >>> binary = smooth_binary(rules, GroupPower("constant"))
        >>> params = {"kernel": jnp.array([[0.3, -0.2], [-0.1, 0.3], [0.4, 0.1], [0.2, 0.0]])}
        >>> goal = jnp.array([[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]]) / 2**0.5
        >>> gradient = jax.jit(jax.grad(lambda params, t: jnp.sum((binary(params, t)["kernel"] - goal) ** 2)))
        >>> for step in range(40):
        ...     grads = gradient(params, step / 40)
        ...     params = jax.tree.map(lambda w, g: w - 0.05 * g, params, grads)
        >>> forms = lcq.extract(binary, params)
        >>> worst = binary.deviation(params, 1.0)["kernel"].max()
        >>> bool(jnp.allclose(forms["kernel"].dense(), goal)), float(worst) < 0.01
        (True, True)

    Source: Shulman, arXiv 2107.01400; see the module for what is from it and what is not.
    """
    rules = checked(rules)
    if not any(isinstance(rule, Rule) and rule.scheme is not None for rule in rules):
        raise ValueError("expected a rule with a scheme, such as lcq.Rule('(.*/)?kernel', lcq.Binary(per='channel'))")
    if not isinstance(binarization, Binarization | None):
        raise ValueError(f"expected a binarization, such as GroupPower('constant'), got {binarization!r}; call it")
    for rule in rules:
        scheme = rule.scheme if isinstance(rule, Rule) else None
        if scheme is not None and scheme != Binary(per=getattr(scheme, "per", None)):
            raise ValueError(
                f"rule {rule.pattern!r}: expected lcq.Binary(per=...), which says what makes a group, got {scheme!r}"
            )
        if scheme is not None and rule.joint:
            raise ValueError(f"rule {rule.pattern!r}: expected groups inside of leaves, got joint=True; drop it")
    chosen = GroupPower() if binarization is None else binarization
    for rule in rules:
        if rule.layout is not None and chosen.alpha == "constant":
            raise ValueError(
                f"rule {rule.pattern!r}: the constant alpha has all axes but the last as inputs: expected no layout, "
                f"got {rule.layout!r}; transpose the leaf, or take alpha='mean'"
            )
    return SmoothBinary(rules, chosen)
