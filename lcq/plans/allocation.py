"""A budget of bytes, spent on the schemes that together distort the weights, or a function's outputs, least."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.typing import ArrayLike
from rich.console import Console, ConsoleOptions, RenderableType
from rich.text import Text

from lcq.io.entropy_coding.coded_bits import coded_bits
from lcq.plans.convex_hull import Point, along, sweep
from lcq.plans.knapsack import best_choice
from lcq.plans.output_error import OutputError
from lcq.plans.plan import Plan
from lcq.plans.text import right_side
from lcq.reporting.columns import Column, fit, grid
from lcq.reporting.summary import dense_of, text
from lcq.schemes.base import Scheme
from lcq.tree.aliases import Batch, Function, Leaves, Params
from lcq.tree.compress import check_finite, sizes
from lcq.tree.paths import flatten
from lcq.tree.rules import Rule, Task, resolve

_SPARE = ("share", "bits/weight", "bits")
"""What is left out where there is no room."""


class Choice(NamedTuple):
    """What became of a leaf.

    Attributes:
        path: Path of the leaf in the tree.
        shape: Shape of the leaf.
        scheme: The chosen candidate; None leaves the leaf as it is.
        bits: Bits of its form, in a coded file or packed.
        distortion: Distortion sum h (w - Delta(Theta))^2, or the error of the outputs, as it was chosen by.
    """

    path: str
    shape: tuple[int, ...]
    scheme: Scheme | None
    bits: int
    distortion: float

    @property
    def rule(self) -> Rule:
        """The scheme for this leaf and no other."""
        return Rule(re.escape(self.path), self.scheme)


@dataclasses.dataclass(frozen=True)
class Allocation:
    """The best choices within a budget; prints as a table, and in colour through rich.

    Attributes:
        choices: One choice for each leaf that has candidates, in the order of the tree.
        other: Bits of everything else, stored as it is.
        budget: Bits of the budget.
        curve: (bytes, distortion) of the whole tree at every stop along the convex hulls, from the smallest size to
            where no candidate has less distortion.
        bound: Lower bound of the distortion within the budget; `distortion` itself if this choice is known to be the
            best.
    """

    choices: tuple[Choice, ...]
    other: int
    budget: int
    curve: tuple[tuple[int, float], ...]
    bound: float = 0.0

    @property
    def plan(self) -> Plan:
        """A rule for each leaf, for `compress` or `lc`."""
        return Plan(tuple(choice.rule for choice in self.choices))

    @property
    def bits(self) -> int:
        """What the compressed tree takes."""
        return self.other + sum(choice.bits for choice in self.choices)

    @property
    def bytes(self) -> int:
        """`bits` in whole bytes."""
        return -(-self.bits // 8)

    @property
    def unused(self) -> int:
        """Bits of the budget that are left: too few to buy anything, or nothing is left to improve."""
        return self.budget - self.bits

    @property
    def distortion(self) -> float:
        """sum_i D_i over all leaves."""
        return math.fsum(choice.distortion for choice in self.choices)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        fitting, out, space = fit(self._columns(), options.max_width - 2, _SPARE)  # 2: the edges
        yield grid(fitting, space, 3)
        if out:
            yield Text(f"no room in {options.max_width} columns for: {', '.join(out)}")

    def _columns(self) -> list[Column]:
        total = self.distortion
        sums = (self.other, self.bits, self.unused)
        bits = [*(choice.bits for choice in self.choices), *sums]
        shares = [f"{choice.distortion / total if total else 0:.1%}" for choice in self.choices]
        weights = [f"{choice.bits / math.prod(choice.shape):.2f}" for choice in self.choices]
        distortions = [f"{choice.distortion:.2e}" for choice in self.choices]
        return [
            Column("leaf", (*(choice.path for choice in self.choices), "everything else", "total", "unused")),
            Column("shape", (*("x".join(map(str, choice.shape)) for choice in self.choices), "", "", "")),
            Column("scheme", (*(right_side(choice.rule) for choice in self.choices), "", "", "")),
            Column("bits", tuple(f"{each:,}" for each in bits), True),
            Column("bytes", tuple(f"{-(-each // 8):,}" for each in bits), True),
            Column("bits/weight", (*weights, "", "", ""), True),
            Column("distortion", (*distortions, "", f"{total:.2e}", ""), True),
            Column("share", (*shares, "", "", ""), True),
        ]

    def __str__(self) -> str:
        return text(self)


def pareto(
    params: Params,
    candidates: Mapping[str, Sequence[Scheme | None]],
    *,
    bytes: int | None = None,
    bits_per_weight: float | None = None,
    fn: Function | None = None,
    calibration: Iterable[Batch] | None = None,
    importance: Leaves | None = None,
    coded: bool = True,
    progress: Callable[[int, int, str], None] | None = None,
) -> Allocation:
    """Chooses a scheme for every leaf so that the tree fits a budget and the sum of all distortions is least.

        min sum_i D_i  subject to  sum_i B_i <= B,    D_i = sum h (w - Delta(Theta))^2,  B_i the bits of leaf i

    With `fn` D_i is what matters more, how far the outputs of fn move when leaf i alone is replaced,

        D_i = ||fn(w_i <- Delta(Theta)) - fn(w)||^2 / ||fn(w)||^2    over all batches, the sum over the outputs of fn

    which takes a pass of fn over the batches for each leaf and candidate. These add up nearly where they are small.

    Exact, among all combinations of the candidates, for tens of leaves and often for thousands; else near it. How near
    is known: no choice goes below `result.bound`. The result is direct compression at its best;
    `lcq.lc(.., result.plan, ..)` starts from it and trains.

    Args:
        params: a tree of arrays.
        candidates: by pattern, the schemes to choose from; the first pattern that matches a leaf decides, as with
            rules. None among the schemes leaves the leaf as it is. Leaves under no pattern stay arrays. Each leaf has a
            Theta of its own, neither joint nor stacked.
        bytes: the budget for the whole tree, forms and arrays; a file has some more for names and digests.
        bits_per_weight: the same, in bits for each number of the tree, those that are not compressed among them.
        fn: (params, batch) -> a tree of outputs, any function of jax arrays, as for `lcq.quantize`: logits or vectors;
            what is no floating-point number does not count, nor what fn multiplies by a mask of zeros.
        calibration: with fn, batches of unlabelled inputs; a few hundred examples are enough.
        importance: h by path, such as `lcq.ptq.curvature` gives, for the projections and, without fn, for D; of all
            leaves with candidates, since their distortions are added. By default 1.
        coded: whether forms cost what they take in an entropy-coded file, as `lcq.save` writes it, or packed at a fixed
            width, as `lcq.sizes` counts.
        progress: called after each leaf with its number from 1, how many there are, and its path.

    Raises:
        ValueError: not one budget, or less than the smallest size possible; a pattern without a leaf or candidates,
            a scheme with a cost; a leaf a scheme cannot take; importances of other leaves, or not of all of them; fn
            without calibration, or with outputs that are no numbers, all zero, or not finite.

    Example:
        >>> import jax.numpy as jnp, lcq
        >>> w = {"a": jnp.array([0.0, 1.0, 2.0, 3.0]), "b": jnp.array([0.0, 0.1, 0.2, 0.3])}
        >>> best = pareto(w, {".": [lcq.KMeans(2), lcq.KMeans(4)]}, bytes=30, coded=False)
        >>> [(choice.path, choice.scheme.k, choice.bits) for choice in best.choices], best.bytes
        ([('a', 4, 136), ('b', 2, 68)], 26)

    Source: Shoham & Gersho 1988, see `lcq.plans.convex_hull`; between the hull's sizes branch and bound, see
    `lcq.plans.knapsack`.
    """
    leaves = flatten(params)[0]
    tasks = _tasks(params, candidates)
    odd = sorted(tasks.keys() ^ importance.keys()) if importance is not None else []
    if odd:
        raise ValueError(
            f"{', '.join(odd[:4])}: expected importances of the leaves with candidates, of all and no others"
        )
    if (fn is None) != (calibration is None):
        raise ValueError(
            "expected fn= and calibration=, whose outputs say what a choice costs, or neither, got only "
            + ("calibration" if fn is None else "fn")
        )
    for path in tasks:
        check_finite(path, leaves[path])
    other = sum(size.bits for path, size in sizes(params).items() if path not in tasks)
    numbers = sum(math.prod(np.shape(leaf)) for leaf in leaves.values())
    budget = _budget(bytes, bits_per_weight, numbers)
    output_error = None if fn is None or calibration is None else OutputError(fn, params, calibration)
    points = []
    for number, (path, given) in enumerate(tasks.items(), 1):
        h = None if importance is None else importance[path]
        points.append([_point(leaves[path], task, h, coded, output_error) for task in given])
        if progress is not None:
            progress(number, len(tasks), path)
    place, steps = sweep(points)
    sizes_and_errors = list(along(points, place, steps))
    totals = [other + bits for bits, _ in sizes_and_errors]
    if totals[0] > budget:
        raise ValueError(
            f"expected a budget of at least {-(-totals[0] // 8)} bytes, {totals[0] / numbers:.4g} bits for each of "
            f"{numbers} numbers, got {budget // 8} bytes; {-(-other // 8)} are of leaves without candidates"
        )
    places, bound = best_choice(points, budget - other)
    choices = []
    for path, of_leaf, i in zip(tasks, points, places, strict=True):
        task = tasks[path][i]
        choices.append(Choice(path, tuple(np.shape(leaves[path])), task.scheme if task else None, *of_leaf[i]))
    curve = tuple((-(-total // 8), error) for total, (_, error) in zip(totals, sizes_and_errors, strict=True))
    return Allocation(tuple(choices), other, budget, curve, bound)


def _tasks(params: Params, candidates: Mapping[str, Sequence[Scheme | None]]) -> dict[str, list[Task | None]]:
    """Of each leaf that has candidates, its projection by each of them; None for the leaf as it is."""
    if not isinstance(candidates, Mapping):
        raise ValueError(
            "expected candidates by pattern, such as {'(.*/)?kernel': [lcq.KMeans(2), lcq.KMeans(4)]}, "
            f"got {candidates!r}; name the leaves that choose, '.*' for all"
        )
    found: dict[str, list[Task | None]] = {}
    earlier: list[Rule] = []
    for pattern, schemes in candidates.items():
        listed = isinstance(schemes, Sequence) and not isinstance(schemes, str) and len(schemes) > 0
        if not listed or not all(scheme is None or isinstance(scheme, Scheme) for scheme in schemes):
            raise ValueError(
                f"{pattern!r}: expected a list of schemes to choose from, got {schemes!r}; take [lcq.KMeans(2), None]"
            )
        tasks: list[tuple[Task, ...] | None] = []
        for scheme in schemes:
            if scheme is not None and scheme.costly:
                raise ValueError(
                    f"{pattern!r}: {scheme} has a cost, and no direct compression; take its constrained kin"
                )
            resolved = resolve([*earlier, Rule(pattern, scheme)], params)  # finds unmatched patterns
            tasks.append(None if scheme is None else resolved)
        paths = [task.name for task in next((each for each in tasks if each is not None), ())]
        found |= {path: [None if each is None else each[i] for each in tasks] for i, path in enumerate(paths)}
        earlier.append(Rule(pattern, None))
    if not found:
        raise ValueError("expected candidates such as {'(.*/)?kernel': [lcq.KMeans(2), lcq.KMeans(4)]}, got no scheme")
    return {path: found[path] for path in flatten(params)[0] if path in found}


def _budget(size: int | None, bits_per_weight: float | None, numbers: int) -> int:
    if (size is None) == (bits_per_weight is None):
        raise ValueError("expected one budget, bytes= or bits_per_weight=, got " + ("none" if size is None else "both"))
    bits = 8 * size if size is not None else (bits_per_weight or 0) * numbers
    if not 0 <= bits < math.inf:
        raise ValueError(
            f"expected a budget that is a number >= 0, got {size if size is not None else bits_per_weight}"
        )
    return math.floor(bits)


def _point(leaf: Any, task: Task | None, h: ArrayLike | None, coded: bool, output_error: OutputError | None) -> Point:
    """What a candidate costs, and the error of the outputs or sum h (w - Delta(Theta))^2 in float64."""
    if task is None:
        return Point(leaf.size * leaf.dtype.itemsize * 8, 0.0)
    (form,) = task.project((leaf,), importance=None if h is None else (h,))
    dense = dense_of(form)
    if output_error is None:
        error = (np.asarray(leaf, np.float64) - np.asarray(dense, np.float64)) ** 2
        distortion = float(np.sum(error if h is None else error * np.asarray(h, np.float64)))
    else:
        distortion = output_error(task.name, dense)
    if not math.isfinite(distortion):
        raise ValueError(f"{task.name}: expected finite numbers; {task.scheme} gave others; drop this candidate")
    return Point(coded_bits(form).coded if coded else form.pack().bits, distortion)
