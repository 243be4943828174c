"""Plans: rules as one value, as TOML and inside a file; and what rules will do, before anything is done."""

import dataclasses
import os
import re
import tomllib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, overload

import jax

from lcq.artifact.file import read_index, replacing
from lcq.base import Form, Quantizer, Scheme, is_form
from lcq.forms import Codes
from lcq.methods.preview import preview
from lcq.notation import format_scheme, is_none, make, parse_scheme, right_side, settings_of
from lcq.report import Row, Table, rows
from lcq.rules import Rule, Task, checked, flatten, resolve
from lcq.tree import replace, take

_TEXT = re.compile(r"[^\n]*\n|\s*(?:\[\[|rule\s*=|#)")
_KEYS: dict[str, type] = {"pattern": str, "scheme": str, "joint": bool, "stacked": int, "layout": str}


@dataclasses.dataclass(frozen=True)
class Plan(Sequence[Rule]):
    """Rules in order of precedence, as one value: give it wherever rules are wanted, print it, keep it in a file.

    Its text is TOML, a [[rule]] for each with `pattern`, `scheme` ("None" for none) and, where they say something,
    `joint`, `stacked` and `layout`. `read_plan` gives back an equal plan, and `lcq.save(path, tree, plan=plan)` keeps
    it beside the forms.

    Attributes:
        rules: the first one that matches a leaf decides.

    Raises:
        ValueError: something that is no rule; in `str`, a scheme that has no text.

    Example:
        >>> import lcq
        >>> print(Plan([Rule("head/.*", None), Rule("(.*/)?kernel", lcq.KMeans(4, per="channel"), stacked=1)]))
        [[rule]]
        pattern = 'head/.*'
        scheme = "None"
        <BLANKLINE>
        [[rule]]
        pattern = '(.*/)?kernel'
        scheme = "KMeans(4, per='channel')"
        stacked = 1
    """

    rules: Sequence[Rule]

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", checked(self.rules))

    @overload
    def __getitem__(self, index: int) -> Rule: ...
    @overload
    def __getitem__(self, index: slice) -> "Plan": ...
    def __getitem__(self, index: Any) -> Any:
        return Plan(self.rules[index]) if isinstance(index, slice) else self.rules[index]

    def __len__(self) -> int:
        return len(self.rules)

    def __str__(self) -> str:
        return "\n\n".join(map(_toml, self.rules)) or "rule = []"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the text to a file, such as plan.toml, that `read_plan` and the command line read.

        The file appears whole or not at all, and replaces what was there.

        Raises:
            ValueError: a scheme that has no text, or a name that ends in .lcq, which is for `lcq.save(.., plan=plan)`.
            OSError: the file cannot be written.

        Example:
            >>> import tempfile, lcq
            >>> plan = Plan([Rule("(.*/)?kernel", lcq.KMeans(4))])
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     plan.save(f"{folder}/plan.toml")
            ...     read_plan(f"{folder}/plan.toml") == plan
            True
        """
        if Path(path).suffix.lower() == ".lcq":
            raise ValueError(
                f"{os.fspath(path)}: wanted another name, such as plan.toml; got that of an .lcq file; "
                "lcq.save(path, tree, plan=plan) keeps a plan in one"
            )
        text = f"{self}\n".encode()
        with replacing(path) as file:
            file.write(text)


def parse_plan(text: str) -> Plan:
    """The plan of a TOML text, which may also have comments and anything else that TOML allows.

    Raises:
        ValueError: no TOML, something else than rules, or a rule that is none; says which, counted from 1.

    Example:
        >>> parse_plan('rule = [{pattern = ".*/bias", scheme = "Cast"}]')[0]
        Rule(pattern='.*/bias', scheme=Cast(format='bfloat16'), joint=False, stacked=0, layout=None)
    """
    try:
        document = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ValueError(f"wanted TOML; {error}") from error
    match document:
        case {"rule": [*tables], **rest} if not rest:
            return Plan(tuple(_rule(number, table) for number, table in enumerate(tables, 1)))
    got = ", ".join(map(repr, document)) or "nothing"
    raise ValueError(f"wanted [[rule]] tables with a pattern and a scheme, and nothing else; got {got[:200]}")


def read_plan(path: str | os.PathLike[str]) -> Plan:
    """Reads a plan: of an `.lcq` file the one that was saved in it, of another file its TOML text; or that text itself.

    The text is read, never run. The patterns are another matter: a regular expression can take for ever to match, so
    have a look at the plan of a stranger before you use it.

    Args:
        path: of the file; or the text of a plan, a string of several lines or one that begins as a plan does, with
            "[[rule]]", "rule =" or "#".

    Raises:
        ValueError: no plan in it, or one that is not well-formed; names the file and the rule.
        OSError: the file cannot be opened or read.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     size = Path(folder, "plan.toml").write_text("[[rule]]\\npattern = '.*'\\nscheme = 'Binary(per=64)'")
        ...     print(read_plan(f"{folder}/plan.toml"))
        [[rule]]
        pattern = '.*'
        scheme = "Binary(per=64)"
    """
    if isinstance(path, str) and _TEXT.match(path):
        return parse_plan(path)
    name = os.fspath(path)
    text = read_index(path).plan if Path(path).suffix.lower() == ".lcq" else None
    if text is None and Path(path).suffix.lower() == ".lcq":
        raise ValueError(f"{name}: wanted a plan in the file; it has none: save one with lcq.save(.., plan=plan)")
    try:
        return parse_plan(Path(path).read_bytes().decode() if text is None else text)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def dry_run(
    params: Any,
    rules: Sequence[Rule],
    fn: Callable[[Any, Any], Any] | None = None,
    batch: Any = None,
    *,
    nearest: Sequence[Rule] = (),
) -> Table:
    """Which leaf goes where under `rules`, along which axes it gets scales, and what it will cost. Nothing is computed.

    Without `fn` it is of `compress`, where per="channel" is the last axis and per=g runs along the last but one, or
    what the rule's layout says. With `fn` it is of `quantize`, where products say what a neuron and its inputs are.

    Args:
        params: a tree of arrays or shape structs.
        rules: as for `compress`, or `quantize`.
        fn: (params, batch) -> anything, as for `quantize`; traced, never run.
        batch: one batch of it, of arrays or shape structs.
        nearest: as for `quantize`.

    Returns:
        The table of the tree that `compress`, or `quantize`, would give, with the rule and scheme of every leaf. A
        group length that `compress` refuses for a leaf, and `quantize` may take, is counted and warned of.

    Raises:
        ValueError: as `compress` or `quantize` does, for rules and shapes; `nearest` without `fn`.

    Example:
        >>> import jax.numpy as jnp, lcq
        >>> w, rules = {"w": jnp.zeros((64, 4, 16))}, [lcq.Rule("w", lcq.Uniform(4, per="channel"), layout="ioo")]
        >>> dry_run(w, rules).rows[0].blocks
        'axis 1, axis 2'
        >>> attend = lambda w, x: jnp.einsum("bi,ihd->bhd", x, w["w"])
        >>> dry_run(w, [lcq.Rule("w", lcq.Uniform(4, per=32))], attend, jnp.zeros((2, 64))).rows[0].blocks
        '32 of axis 0, axis 1, axis 2'
    """
    rules, nearest = checked(rules), checked(nearest)
    decided = {path: rule for path in flatten(params)[0] if (rule := _decides([*nearest, *rules], path))}
    counted: dict[str, Rule] = {}
    if fn is not None:
        tree, tasks = preview(fn, params, batch, rules, nearest=nearest)
    elif nearest:
        raise ValueError("wanted fn and batch with nearest=, which is quantize's; got none; put it before the rules")
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
            row = row._replace(blocks=f"{counted[row.path].scheme.per} inputs of a product")  # type: ignore[union-attr]
        rule = decided.get(row.path)
        return row if rule is None else row._replace(rule=rule.pattern, scheme=right_side(rule))

    return Table(tuple(map(with_rule, rows(replace(structure, leaves, tasks, forms)))))


def _only_for_products(decided: dict[str, Rule], leaves: dict[str, Any]) -> dict[str, Rule]:
    """Rules of leaves with groups that `compress` cannot cut, and products may; warns of them."""
    found = {}
    for path, rule in decided.items():
        leaf, per = leaves[path], getattr(rule.scheme, "per", None)
        if not (isinstance(rule.scheme, Quantizer) and isinstance(per, int) and rule.layout is None):
            continue
        if not hasattr(leaf, "shape") or is_form(leaf) or len(leaf.shape) < 2 or not leaf.size or leaf.size % per:
            continue
        try:
            rule.scheme.check(leaf.shape[rule.stacked :])
        except ValueError as error:
            found[path] = rule
            warnings.warn(
                f"{path}: compress cannot take this rule: {error}; counted as for quantize, whose groups run along the "
                "inputs of a product; dry_run(params, rules, fn, batch) looks whether they divide them",
                stacklevel=3,
            )
    return found


def _counted(leaf: Any, rule: Rule) -> Form:
    """The form of a leaf cut into groups along no axis of its own."""
    scheme: Any = rule.scheme
    count = leaf.size // scheme.per
    one = jax.eval_shape(_plain_twin(scheme).project, jax.ShapeDtypeStruct((scheme.per, 1), leaf.dtype))
    assert isinstance(one, Codes)
    blocks = (*(1,) * (len(leaf.shape) - 1), count)

    def many(a: Any) -> Any:
        return None if a is None else jax.ShapeDtypeStruct((*blocks, *a.shape[2:]), a.dtype)

    codes = jax.ShapeDtypeStruct(leaf.shape, one.codes.dtype)
    return dataclasses.replace(one, codes=codes, scale=many(one.scale), zero=many(one.zero), levels=many(one.levels))


def _shapes(xs: tuple[Any, ...]) -> tuple[jax.ShapeDtypeStruct, ...]:
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


# TOML


def _toml(rule: Rule) -> str:
    """A rule as a [[rule]] table."""
    scheme = "None" if rule.scheme is None else format_scheme(rule.scheme)
    lines = ["[[rule]]", f"pattern = {_quoted(rule.pattern, literal=True)}", f"scheme = {_quoted(scheme)}"]
    lines += ["joint = true"] * rule.joint + [f"stacked = {rule.stacked}"] * (rule.stacked > 0)
    return "\n".join(lines if rule.layout is None else [*lines, f"layout = {_quoted(rule.layout)}"])


def _quoted(text: str, literal: bool = False) -> str:
    """A TOML string: without escapes if `literal` and possible, for patterns are full of backslashes."""
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError(f"{text!r}: wanted Unicode characters; got half of a surrogate pair, which TOML cannot hold")
    if literal and text.isprintable() and "'" not in text:
        return f"'{text}'"
    words = (f"\\{c}" if c in '"\\' else c if c.isprintable() else f"\\U{ord(c):08x}" for c in text)
    return f'"{"".join(words)}"'


def _rule(number: int, table: Any) -> Rule:
    """The rule of what TOML has in its place."""
    try:
        if not isinstance(table, dict):
            raise ValueError(f"wanted a table; got {table!r:.200}")
        if odd := table.keys() - _KEYS.keys():
            raise ValueError(f"wanted only {', '.join(_KEYS)}; got {', '.join(sorted(odd))[:200]!r}")
        for key, kind in _KEYS.items():
            if (key in table or key in ("pattern", "scheme")) and type(table.get(key)) is not kind:
                got = repr(table[key])[:200] if key in table else "none"
                raise ValueError(f"wanted {key}: {kind.__name__}; got {got}")
        settings = {key: table[key] for key in ("joint", "stacked", "layout") if key in table}
        return Rule(table["pattern"], None if is_none(table["scheme"]) else parse_scheme(table["scheme"]), **settings)
    except (ValueError, OverflowError, RecursionError) as error:
        shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(error))  # it may quote a stranger's file
        raise ValueError(f"rule {number}: {shown}") from error
