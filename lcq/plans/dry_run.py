"""What rules will give on a tree, before anything is computed."""

import dataclasses
import re
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from lcq.forms import Codes, Rotated
from lcq.forms.base import Form, is_form
from lcq.forms.validate import finds_fault
from lcq.plans.text import make, right_side, settings_of
from lcq.ptq.preview import preview
from lcq.reporting.summary import Row, Table, rows
from lcq.schemes.base import Quantizer, Scheme
from lcq.schemes.rotated import unrotated
from lcq.tree.aliases import Batch, Function, Leaves, Params
from lcq.tree.compress import replace, take
from lcq.tree.paths import flatten
from lcq.tree.rules import Rule, Rules, Task, checked, resolve


def dry_run(
    params: Params,
    rules: Rules,
    fn: Function | None = None,
    batch: Batch = None,
    *,
    rtn: Rules = (),
) -> Table:
    """Which leaf goes where under `rules`, along which axes it gets scales, and what it will cost. Nothing is computed.

    Without `fn` it is of `compress`, where per="channel" is the last axis and per=g runs along the last but one, or
    what the rule's layout says. With `fn` it is of `quantize`, where products say what a neuron and its inputs are.

    Args:
        params: a tree of arrays or shape structs.
        rules: as for `compress`, or `quantize`.
        fn: (params, batch) -> anything, as for `quantize`; traced, never run.
        batch: one batch of it, of arrays or shape structs.
        rtn: as for `quantize`.

    Returns:
        The table of the tree that `compress`, or `quantize`, would give, with the rule and scheme of every leaf. A
        group length that `compress` refuses for a leaf, and `quantize` may take, is counted and warned of.

    Raises:
        ValueError: as `compress` or `quantize` does, for rules and shapes; `rtn` without `fn`, or `fn` without
            `batch`.

    Example:
        >>> import jax.numpy as jnp, lcq
        >>> w, rules = {"w": jnp.zeros((64, 4, 16))}, [lcq.Rule("w", lcq.Uniform(4, per="channel"), layout="ioo")]
        >>> dry_run(w, rules).rows[0].blocks
        'axis 1, axis 2'
        >>> attend = lambda w, x: jnp.einsum("bi,ihd->bhd", x, w["w"])
        >>> dry_run(w, [lcq.Rule("w", lcq.Uniform(4, per=32))], attend, jnp.zeros((2, 64))).rows[0].blocks
        '32 of axis 0, axis 1, axis 2'
    """
    rules, rtn = checked(rules), checked(rtn)
    decided = {path: rule for path in flatten(params)[0] if (rule := _decides([*rtn, *rules], path))}
    counted: dict[str, Rule] = {}
    if fn is not None:
        if batch is None:
            raise ValueError("expected a batch of fn, or its shapes, got none; pass dry_run(params, rules, fn, batch)")
        tree, tasks = preview(fn, params, batch, rules, rtn=rtn)
    elif rtn:
        raise ValueError("expected fn and batch with rtn=, which is quantize's, got none; put it before the rules")
    else:
        counted = _only_for_products(decided, flatten(params)[0])
        taken = [Rule(re.escape(path), None) for path in counted]
        idle = [rule for rule in counted.values() if not any(r is rule for p, r in decided.items() if p not in counted)]
        tree, tasks = params, resolve([*taken, *(rule for rule in rules if rule not in idle)], params)
    leaves, structure = flatten(tree)
    forms = [jax.eval_shape(_traceable(task).project, _shapes(take(leaves, task))) for task in tasks]
    leaves |= {path: _counted(leaves[path], rule) for path, rule in counted.items()}

    def with_rule(row: Row) -> Row:
        if row.path in counted:
            row = row._replace(blocks=f"{_group(counted[row.path])} inputs of a product")
        rule = decided.get(row.path)
        return row if rule is None else row._replace(rule=rule.pattern, scheme=right_side(rule))

    return Table(tuple(map(with_rule, rows(replace(structure, leaves, tasks, forms)))))


def _only_for_products(decided: dict[str, Rule], leaves: Leaves) -> dict[str, Rule]:
    """Rules of leaves with groups that `compress` cannot cut, and products may; warns of them."""
    found = {}
    for path, rule in decided.items():
        leaf, scheme = leaves[path], unrotated(rule.scheme)
        per = getattr(scheme, "per", None)
        if not (isinstance(scheme, Quantizer) and isinstance(per, int) and rule.layout is None):
            continue
        if not hasattr(leaf, "shape") or is_form(leaf) or len(leaf.shape) < 2 or not leaf.size or leaf.size % per:
            continue
        try:
            scheme.check(leaf.shape[rule.stacked :])
        except ValueError as error:
            if not finds_fault(error):
                raise
            found[path] = rule
            warnings.warn(
                f"{path}: compress cannot take this rule: {error}; counted as for quantize, whose groups run along the "
                "inputs of a product; dry_run(params, rules, fn, batch) looks whether they divide them",
                stacklevel=3,
            )
    return found


def _group(rule: Rule) -> int:
    """How many weights share a scale by the rule of a leaf in groups."""
    scheme = unrotated(rule.scheme)
    assert isinstance(scheme, Quantizer) and isinstance(scheme.per, int)
    return scheme.per


def _counted(leaf: Any, rule: Rule) -> Form:
    """The form of a leaf cut into groups along no axis of its own."""
    group = _group(rule)
    count = leaf.size // group
    one = jax.eval_shape(_plain_twin(rule.scheme).project, jax.ShapeDtypeStruct((group, 1), leaf.dtype))
    whole, one = one, one.inner if isinstance(one, Rotated) else one
    assert isinstance(one, Codes)
    blocks = (*(1,) * (len(leaf.shape) - 1), count)

    def many(a: Any) -> Any:
        return None if a is None else jax.ShapeDtypeStruct((*blocks, *a.shape[2:]), a.dtype)

    codes = jax.ShapeDtypeStruct(leaf.shape, one.codes.dtype)
    form = dataclasses.replace(one, codes=codes, scale=many(one.scale), zero=many(one.zero), levels=many(one.levels))
    return dataclasses.replace(whole, inner=form) if isinstance(whole, Rotated) else form


def _shapes(xs: tuple[Array | np.ndarray | jax.ShapeDtypeStruct, ...]) -> tuple[jax.ShapeDtypeStruct, ...]:
    return tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in xs)


def _traceable(task: Task) -> Task:
    """A solver on the host cannot be traced; its plain twin gives forms of the same shapes."""
    return dataclasses.replace(task, scheme=_plain_twin(task.scheme)) if task.scheme.host else task


def _plain_twin(setting: Any) -> Any:
    """A scheme, and those that are settings of it, with exact=False."""
    if isinstance(setting, tuple):
        return tuple(map(_plain_twin, setting))
    if not isinstance(setting, Scheme):
        return setting
    settings = {name: _plain_twin(value) for name, value in settings_of(setting).items()}
    return make(type(setting), settings | ({"exact": False} if "exact" in settings else {}))


def _decides(rules: Sequence[Rule], path: str) -> Rule | None:
    return next((rule for rule in rules if re.fullmatch(rule.pattern, path)), None)
