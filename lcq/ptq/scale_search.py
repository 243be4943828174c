"""The scale of a codebook by the exact residual, for every neuron that has its own.

    argmin over f of ||X w - Y q_f||^2,    q_f the codes with the scheme's scale times f

Every f costs a whole rounding. Where these are cheap nine coarse factors are tried, 1 among them, and eight more around
the best. Elsewhere as few are tried on all neurons as find nearly the same:

    sample    the coarse factors on 64 neurons, then a few around the one that is best for these together. What a neuron
              gains by factors of its own is mostly luck, which a few of them have as well as many. Not so of those with
              far larger errors than most, which make massive activations: 64 of them get all factors for themselves
    sketch    where every weight is rounded for itself, 33 factors by e'(U'U + diag(d))e in place of e'He, with U the 16
              directions that H has most of and d the rest of its diagonal; then the two best of each neuron

1 is tried always, and stays unless another is better beyond rounding errors. Both signs are tried where the mirrored
table is another one.
"""

from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from lcq.forms import Trellis
from lcq.ptq.inputs import Inputs
from lcq.ptq.rounding.base import Rounding
from lcq.ptq.rounding.coded import Coded, codes_of
from lcq.ptq.sums import Sums, unchanged
from lcq.schemes.nearest import mirrored

_COARSE = np.float32(1.15) ** np.arange(-4, 5, dtype=np.float32)
"""Factors that are tried first, .."""

_FINE = np.float32(1.018) ** np.array([-4, -3, -2, -1, 1, 2, 3, 4], np.float32)
""".. and then times the best of them."""

_NEAR, _WIDE = 1.018, 768
"""The step of the factors that are tried on all neurons around the one that is best for the sample. With so many inputs
a neuron has less luck to gain: half as many, twice as far apart."""

_SKETCHED = np.float32(1.036) ** np.arange(-16, 17, dtype=np.float32)
_DIRECTIONS, _BEST = 16, 2

_SAME = 1e-5
"""A factor whose residual is less by no more than this part of that of factor 1 is no better."""

_INPUTS, _NEURONS = 256, 64
"""Where every factor is tried on all neurons: with less inputs, or no more neurons."""

_FAR = 4.0
"""A neuron whose residual is that many times the median's has all factors to itself."""


def sample(inputs: int, neurons: int) -> np.ndarray | None:
    """The neurons that stand for all where there are many; None where a rounding is cheap.

    Any 64 that have nothing to do with how a net uses its neurons.

    Example:
        >>> sample(512, 512)[:4], sample(512, 64)
        (array([ 2,  5, 15, 41]), None)
    """
    if inputs < _INPUTS or neurons <= _NEURONS:
        return None
    return np.sort(np.random.default_rng(0).permutation(neurons)[:_NEURONS])


def runs(method: Rounding, form: Coded, many: bool) -> int:
    """At least how many roundings of all neurons a search takes; `many` is whether there is a sample."""
    signs = len(_signs(form))
    return 1 + method.tries + signs - 1 if many else signs * len(_COARSE) + len(_FINE)


class Search:
    """The best form of those tried so far.

    Args:
        problem: ready.
        form: the scheme's, [G, N, n].
        tied: axes of losses [G, n] over which one scale is shared.
        key: for methods that draw.

    Attributes:
        form: The best for every neuron, or for all that share a scale, on the host.
        factor: What the scheme's scale was multiplied by, [G or 1, n or 1].
    """

    def __init__(self, problem: Sums | Inputs, form: Coded, tied: tuple[int, ...], key: Array | None) -> None:
        self._problem, self._given, self._tied, self._key = problem, form, tied, key
        one = unchanged(form)
        found, losses = problem.tried(form, one, key)
        self.form: Coded = jax.device_get(found)
        self._first: Any = self._summed(losses)
        self._best: Any = self._first
        self.factor = np.ones(self._best.shape, np.float32)
        self._one = one

    def attempt(self, factor: Any) -> Float[np.ndarray, "G n"]:
        """The losses for a factor, summed where a scale is shared; what is better is kept."""
        assert self._one is not None
        if np.all(factor == 1):
            return self._first
        found, each = self._problem.tried(self._given, self._one * np.float32(factor), self._key)
        losses = self._summed(each)
        better = (losses < self._first - _SAME * np.abs(self._first)) & (losses < self._best)
        if better.any():
            self._best = np.where(better, losses, self._best)
            self.factor = np.where(better, np.float32(factor), self.factor)
            self._keep(better, jax.device_get(found))
        return losses

    def whole(self) -> None:
        """Nine coarse factors, or eighteen, then eight more."""
        for sign in _signs(self._given):
            for factor in _COARSE:
                self.attempt(sign * factor)
        centre = self.factor
        for factor in _FINE:
            self.attempt(centre * factor)

    def around(self, centre: Float[np.ndarray, "G 1"], tries: int) -> None:
        """Factors around one of each group, of the sign that is better there."""
        signs = _signs(self._given)
        losses = np.stack([self.attempt(sign * centre) for sign in signs])
        sign = np.asarray(signs, np.float32)[losses.argmin(0)]
        far = 2 if codes_of(self._given).shape[1] >= _WIDE else 1
        for power in range(-(tries - 1), tries, far):
            if power:
                self.attempt(sign * centre * np.float32(_NEAR**power))

    def singly(self) -> None:
        """All factors for the neurons with the largest losses, if one has far more than most."""
        if self._tied or not (self._best.max(1) > _FAR * np.median(np.abs(self._best), 1)).any():
            return
        columns = np.sort(np.argsort(self._best, 1, kind="stable")[:, -_NEURONS:], 1)

        def of(a: Any) -> np.ndarray:
            a = np.asarray(jax.device_get(a))
            return a if a.shape[2] == 1 else np.take_along_axis(a, _along(columns, a.ndim), 2)

        problem = self._problem.of_neurons(of(self._problem.w)).ready()
        few = Search(problem, jax.tree.map(of, self._given), (), self._key)
        few.whole()
        better = few._best < of(self._best[:, None])[:, 0]

        def put(new: Any, old: Any) -> np.ndarray:
            if old.shape[2] == 1:
                return old
            kept = np.array(old)
            np.put_along_axis(kept, _along(columns, old.ndim), np.where(_along(better, new.ndim), new, of(old)), 2)
            return kept

        self.form = jax.tree.map(put, few.form, self.form)
        self.factor = put(few.factor[:, None], self.factor[:, None])[:, 0]

    def sketched(self) -> None:
        """The best of many factors by a sketch of H."""
        assert isinstance(self._problem, Sums)
        factors = np.concatenate([sign * _SKETCHED for sign in _signs(self._given)])
        sketches = [sketch(gram) for gram in np.asarray(self._problem.statistics.gram)]
        directions, rest = map(np.stack, zip(*sketches, strict=True))
        losses = self._problem.sketched(self._given, factors, directions, rest)
        order = np.stack([self._summed(each) for each in losses]).argsort(0, kind="stable")
        for place in order[:_BEST]:
            self.attempt(factors[place])

    def _summed(self, losses: Any) -> Float[np.ndarray, "G n"]:
        losses = np.asarray(losses)
        return losses.sum(self._tied, keepdims=True) if self._tied else losses

    def _keep(self, better: np.ndarray, found: Coded) -> None:
        def one(new: Any, old: Any) -> Any:
            return np.where(_along(better, new.ndim), new, old)

        self.form = jax.tree.map(one, found, self.form)


def _along(numbers: np.ndarray, axes: int) -> np.ndarray:
    """Numbers [G, n] as an array of so many axes, of which the third is that of neurons."""
    return numbers.reshape(len(numbers), 1, -1, *[1] * (axes - 3))


def centre_of(few: Sums | Inputs, form: Coded, key: Array | None) -> Float[np.ndarray, "G 1"]:
    """The coarse factor that is best for a sample of neurons together, its sign left out.

    Args:
        few: the problem of the sample, ready.
        form: of the sample.
        key: likewise.
    """
    search = Search(few, form, (), key)
    losses = np.stack([[search.attempt(sign * factor) for factor in _COARSE] for sign in _signs(form)]).min(0)
    best = losses.sum(-1).argmin(0)
    return _COARSE[best][:, None]


def sketch(gram: Float[np.ndarray, "N N"]) -> tuple[Float[np.ndarray, "16 N"], Float[np.ndarray, "N"]]:
    """U and d, so that H is about U'U + diag(d), and has their diagonal.

    Source: subspace iteration and the Nystroem method, Halko, Martinsson & Tropp, SIAM Review 53 (2011).
    """
    probes = np.random.default_rng(0).normal(size=(len(gram), _DIRECTIONS)).astype(gram.dtype)
    for _ in range(2):
        probes = np.linalg.qr(gram @ probes)[0]
    across = probes.T @ gram
    values, vectors = np.linalg.eigh(across.astype(np.float64) @ probes)
    known = values > 1e-6 * max(values[-1], 0)
    root = np.where(known, 1 / np.sqrt(np.where(known, values, 1)), 0)[:, None] * vectors.T
    directions = (root @ across).astype(gram.dtype)
    return directions, np.maximum(np.diagonal(gram) - (directions**2).sum(0), 0)


def _signs(form: Coded) -> tuple[int, ...]:
    """Of the factors that are tried; both where the mirrored table is another one."""
    if isinstance(form, Trellis):
        return (1,)
    one = form.scale is None or form.zero is not None or (form.values is not None and mirrored(form.values))
    return (1,) if one else (1, -1)
