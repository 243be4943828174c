"""Where to compress: rules on leaf paths, resolved once into tasks."""

import dataclasses
import difflib
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree
from typing_extensions import TypeAliasType

from lcq.forms.axes import check_layout, mixes_layers, warning
from lcq.forms.base import Form, is_form, share
from lcq.forms.blocks import block_counts
from lcq.forms.processes import check_agreement, shared_by_processes
from lcq.forms.validate import named
from lcq.schemes.base import Scheme, check_importance
from lcq.tree.mapped import mapped
from lcq.tree.paths import flatten, leave_out, places_of_none


@dataclasses.dataclass(frozen=True)
class Rule:
    """Says how the leaves whose path matches are compressed. The first rule that matches a leaf decides.

    Attributes:
        pattern: A regular expression that must match the whole path; paths are keys joined by "/", as in
            "dense0/kernel". "(.*/)?kernel" matches at any depth.
        scheme: The scheme that projects the matching leaves; None leaves them alone.
        joint: Whether all matching leaves share one Theta (one codebook, one budget), stored and counted once.
        stacked: Number of leading axes of a leaf that count independent layers or experts, each with a Theta of its
            own.
        layout: The axes behind those, a letter for each: "o" outputs, "i" inputs, any other a window; None for "io" and
            "hwio", kernels of JAX. per="channel" tells apart the outputs, and per=g runs along the inputs: "oi" for
            weights of PyTorch, filters too, "ioo" for [inputs, heads, units]. Not for `per` as a tuple, which gives
            lengths itself. In `quantize` the products decide.

    Example:
        >>> import lcq
        >>> Rule("(.*/)?bias", lcq.Cast("bfloat16"))
        Rule(pattern='(.*/)?bias', scheme=Cast(format='bfloat16'), joint=False, stacked=0, layout=None)
        >>> w = {"weight": jnp.array([[1.0, 2.0, 3.0], [40.0, 50.0, 60.0]])}  # (out, in)
        >>> form = lcq.compress(w, [Rule("weight", lcq.Uniform(8, per="channel"), layout="oi")])["weight"]
        >>> form.scale.shape
        (2, 1)
    """

    pattern: str
    scheme: Scheme | None
    joint: bool = False
    stacked: int = 0
    layout: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str):
            raise ValueError(f"expected a regular expression, got {self.pattern!r}; write it as a string")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(
                f"expected a regular expression, got {self.pattern!r} ({error}); '.*' stands for any characters"
            ) from error
        if not (self.scheme is None or isinstance(self.scheme, Scheme)):
            raise ValueError(
                f"rule {self.pattern!r}: expected a scheme such as lcq.KMeans(4), or None, got {self.scheme!r}"
            )
        if isinstance(self.stacked, bool) or not isinstance(self.stacked, int) or self.stacked < 0:
            raise ValueError(
                f"rule {self.pattern!r}: expected stacked >= 0, got {self.stacked!r}; count the axes of layers"
            )
        if self.layout is None:
            return
        with named(f"rule {self.pattern!r}"):
            check_layout(self.layout)
        if self.scheme is not None and any(isinstance(per, tuple) for per in self.scheme.cuts):
            raise ValueError(
                f"rule {self.pattern!r}: expected layout= or lengths as a tuple, got {self.scheme} and layout="
                f"{self.layout!r}, which both say what the axes are; drop one"
            )


Rules = TypeAliasType("Rules", Sequence[Rule])
"""Which leaves become what; the first rule that matches a leaf decides."""


@dataclasses.dataclass(frozen=True)
class Task:
    """One C step: the leaves that share a Theta, and the scheme that projects them."""

    paths: tuple[str, ...]
    scheme: Scheme
    stacked: int = 0

    @property
    def name(self) -> str:
        """The path of its first leaf, which no other task has."""
        return self.paths[0]

    def project(
        self,
        xs: tuple[Array | np.ndarray | np.number, ...],
        previous: tuple[Form, ...] | None = None,
        mu: ArrayLike | None = None,
        importance: PyTree = None,
    ) -> tuple[Form, ...]:
        """The C step of this task: `scheme.project`, mapped over the stacked axes.

        Args:
            xs: the leaves, in the order of `paths`.
            previous: their forms, as a warm start.
            mu: the penalty weight.
            importance: an array for each leaf that broadcasts against the whole of it, stacked axes included.
        """
        with named(", ".join(self.paths)):
            if importance is not None:
                importance = tuple(
                    jnp.broadcast_to(h, x.shape[: self.stacked] + h.shape[self.stacked :]) if self.stacked else h
                    for h, x in zip(check_importance(xs, importance), xs, strict=True)
                )
            for x in xs if self.stacked else ():
                if not isinstance(x, jax.core.Tracer):
                    self.scheme.check_numbers(jnp.asarray(x))
            project = _project_each if self.scheme.host and self.stacked else _project_mapped
            forms = project(self.scheme, xs, previous, mu, importance, self.stacked)
        if len(self.paths) > 1:
            forms = tuple(share(form, self.name) for form in forms)
        return forms


def _project_mapped(
    scheme: Scheme, xs: PyTree, previous: PyTree, mu: ArrayLike | None, importance: PyTree, stacked: int
) -> tuple[Form, ...]:
    """Absent warm starts and importances are trees without leaves to map over."""
    if not stacked:
        return scheme.project(xs, previous, mu=mu, importance=importance)
    return mapped(lambda x, p, h: _project_mapped(scheme, x, p, mu, h, stacked - 1), xs, previous, importance)


def _project_each(
    scheme: Scheme, xs: PyTree, previous: PyTree, mu: ArrayLike | None, importance: PyTree, stacked: int
) -> tuple[Form, ...]:
    """The same for solvers on the host, which cannot be mapped: one after another, then stacked."""
    if not stacked:
        return scheme.project(xs, previous, mu=mu, importance=importance)

    def at(i: int) -> PyTree:
        return jax.tree.map(lambda a: a[i], (xs, previous, importance))

    each = []
    for i in range(xs[0].shape[0]):
        x, p, h = at(i)
        each.append(_project_each(scheme, x, p, mu, h, stacked - 1))
    return jax.tree.map(lambda *a: jnp.stack(a), *each)


def checked(rules: object) -> tuple[Rule, ...]:
    """Rules as a tuple.

    Raises:
        ValueError: anything else, with what was meant.
    """
    like = "[lcq.Rule('(.*/)?kernel', lcq.KMeans(4))]"
    if isinstance(rules, Rule):
        raise ValueError(f"expected a list of rules, got one rule, {rules!r}; put it into brackets: [rule]")
    if isinstance(rules, Scheme):
        raise ValueError(
            f"expected a list of rules, got the scheme {rules!r}; say for which leaves: [lcq.Rule('.*', scheme)]"
        )
    if isinstance(rules, Mapping):
        raise ValueError(
            f"expected a list of rules such as {like}, got a {type(rules).__name__}; "
            "write [lcq.Rule(pattern, scheme) for pattern, scheme in rules.items()]"
        )
    if isinstance(rules, str) or not isinstance(rules, Iterable):
        raise ValueError(
            f"expected a list of rules such as {like}, got {rules!r}; make lcq.Rule(pattern, scheme) of each"
        )
    rules = tuple(rules)
    for rule in rules:
        if not isinstance(rule, Rule):
            raise ValueError(f"expected rules such as {like}, got {rule!r}; make lcq.Rule(pattern, scheme) of it")
    return rules


def check_same_rules(rules: Sequence[object], tree: PyTree) -> None:
    """Raises in every process if arrays of a tree lie on the devices of several, and these have different rules.

    Such processes would run different programs, and wait for each other for ever.

    Args:
        rules: rules, or tasks.
        tree: parameters; what is traced cannot be looked at.

    Raises:
        ValueError: shows the first that differs.
    """
    if shared_by_processes(tree):
        said = list(map(repr, rules if isinstance(rules, Sequence) else [rules]))
        check_agreement("rules", said, "make them by the same code and settings in every process")


def resolve(rules: Sequence[Rule], tree: PyTree, warn: bool = True) -> tuple[Task, ...]:
    """Assigns every leaf of `tree` to the first rule that matches it.

    Warns of leaves whose layers would share scales or codebooks because the rule does not say that they are stacked.

    Args:
        rules: in order of precedence.
        tree: parameters; arrays or shape structs.
        warn: False where the same rules were resolved before.

    Returns:
        Tasks in the order of the tree's leaves, a joint task at its first leaf.

    Raises:
        ValueError: rules that are none, a rule that decides no leaf (with the nearest paths), or a leaf its scheme
            cannot take.
    """
    rules = checked(rules)
    leaves, _ = flatten(tree)
    chosen: list[list[str]] = [[] for _ in rules]
    for path in leaves:
        for matched, rule in zip(chosen, rules, strict=True):
            if re.fullmatch(rule.pattern, path):
                matched.append(path)
                break
    tasks = []
    for matched, rule in zip(chosen, rules, strict=True):
        if not matched:
            raise ValueError(_unmatched(rule, rules, list(leaves), tree))
        if rule.scheme is None:
            continue
        schemes = [_fitted(path, leaves[path], rule) for path in matched]
        groups = [tuple(matched)] if rule.joint else [(path,) for path in matched]
        if rule.joint and rule.stacked and len({leaves[p].shape[: rule.stacked] for p in matched}) > 1:
            raise ValueError(
                f"rule {rule.pattern!r}: jointly stacked leaves must agree in their leading axes: {matched}"
            )
        if rule.joint and len(set(schemes)) > 1:
            raise ValueError(
                f"rule {rule.pattern!r}: joint leaves with a layout must have equally many axes: {matched}"
            )
        tasks += [Task(group, scheme, rule.stacked) for group, scheme in zip(groups, schemes, strict=False)]
        if warn and rule.layout is None and rule.scheme.cuts:
            _warn(rule, matched, leaves)
    order = {path: i for i, path in enumerate(leaves)}
    return tuple(sorted(tasks, key=lambda task: order[task.name]))


def _warn(rule: Rule, paths: Sequence[str], leaves: Mapping[str, object]) -> None:
    """Says which leaves seem to be stacks of layers that share what `per` should give each of them."""
    assert rule.scheme is not None
    named = [per for per in rule.scheme.cuts if per is not None and not isinstance(per, tuple)]
    if not named:
        return
    shapes = {path: tuple(getattr(leaf, "shape", ())) for path, leaf in leaves.items()}
    for path in paths:
        shape, n = shapes[path], rule.stacked
        if mixes_layers(path, shapes, n):
            before, one = (math.prod(block_counts(named[0], shape[i:])) for i in (n, n + 1))
            words = warning(path, shape, named[0], n, before, shape[n] * one)
            warnings.warn(words, stacklevel=4)  # where the caller was called that resolves rules


def _fitted(path: str, leaf: Any, rule: Rule) -> Scheme:
    """The scheme of a rule for one of its leaves."""
    assert rule.scheme is not None
    name, remedy = path or "params, which is one leaf without a name", f"exclude it with {leave_out(path)} before it"
    if is_form(leaf):
        raise ValueError(
            f"{name}: rule {rule.pattern!r} wants a floating-point array, got a form, {type(leaf).__name__}, which is "
            f"compressed already; make it dense with lcq.decompress, or {remedy}"
        )
    if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.floating):
        got = f"{leaf.dtype}{list(leaf.shape)}" if hasattr(leaf, "dtype") else type(leaf).__name__
        raise ValueError(f"{name}: rule {rule.pattern!r} wants a floating-point array, got {got}; {remedy}")
    if leaf.size == 0:
        got = f"{leaf.dtype}{list(leaf.shape)}"
        raise ValueError(f"{name}: rule {rule.pattern!r} wants at least one weight, got {got}, an empty leaf; {remedy}")
    if leaf.ndim < rule.stacked:
        raise ValueError(
            f"{name}: rule {rule.pattern!r} wants {rule.stacked} stacked axes, got {leaf.dtype}{list(leaf.shape)}; "
            f"lower stacked=, or {remedy}"
        )
    shape = leaf.shape[rule.stacked :]
    with named(name, f"; change rule {rule.pattern!r}, or {remedy}"):
        scheme = rule.scheme if rule.layout is None else rule.scheme.oriented(rule.layout, len(shape))
        scheme.check(shape)
    return scheme


def _unmatched(rule: Rule, rules: Sequence[Rule], paths: list[str], tree: PyTree) -> str:
    taken = [path for path in paths if re.fullmatch(rule.pattern, path)]
    if taken:
        return (
            f"rule {rule.pattern!r} decides no leaf: earlier rules take {', '.join(taken[:4])}; move it up or drop it"
        )
    if paths == [""]:
        return (
            f"rule {rule.pattern!r} matches no leaf: params is one leaf, which has no name; give it one, "
            "{'kernel': params}, or take scheme.project(params)"
        )
    nothing = [path for path in places_of_none(tree) if re.fullmatch(rule.pattern, path)]
    if nothing:
        return (
            f"rule {rule.pattern!r} decides no leaf: {', '.join(nothing[:4])} is None, without weights; drop the rule, "
            "or give the leaf an array"
        )
    plain = re.sub(r"[\\^$.|?*+(){}\[\]]", "", rule.pattern)
    near = difflib.get_close_matches(plain, paths, n=4, cutoff=0.0)
    return (
        f"rule {rule.pattern!r} matches no leaf (a pattern must match the whole path); "
        f"the nearest of {len(paths)} paths: {', '.join(near) or 'none, the tree is empty'}"
    )
