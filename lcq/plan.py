"""Rules as text, and what they will do: "PATTERN=SCHEME" <-> `Rule`, and a dry run of a list of rules."""

import ast
import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

import jax

from lcq.base import Scheme
from lcq.report import Row, Table, rows
from lcq.rules import Rule, Task, flatten, resolve
from lcq.schemes.cast import Cast
from lcq.schemes.kmeans import KMeans
from lcq.schemes.levels import Binary, Levels, PowersOfTwo, Ternary
from lcq.schemes.uniform import Uniform
from lcq.tree import replace, take

SCHEMES: dict[str, Callable[..., Scheme]] = {
    "KMeans": KMeans,
    "Levels": Levels,
    "Binary": Binary,
    "Ternary": Ternary,
    "PowersOfTwo": PowersOfTwo,
    "Uniform": Uniform,
    "Cast": Cast,
}
"""What a scheme's text may name: classes, and functions that give one of them."""


def parse_scheme(text: str) -> Scheme:
    """The scheme that a text such as "KMeans(4, per='channel')" or "kmeans(k=4)" names.

    Only the schemes of `SCHEMES` and literals are understood, nothing is run. Names may be written in any case, with or
    without underscores and a leading "lcq."; lists count as tuples; a scheme without arguments needs no parentheses.

    Raises:
        ValueError: anything else, or settings that the scheme refuses; lists the schemes and their settings.

    Example:
        >>> parse_scheme("powers_of_two(3)") == PowersOfTwo(3)
        True
    """
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"wanted a scheme; got {text!r}, which does not parse; {_known()}") from error
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    match call.func:
        case ast.Name(name) | ast.Attribute(ast.Name("lcq"), name):
            name = _SPELLINGS.get(_plain(name), "")
        case _:
            name = ""
    if not name:
        raise ValueError(f"wanted a scheme; got {text!r}; {_known()}")
    try:
        given = [_tuples(ast.literal_eval(argument)) for argument in call.args]
        named = {str(k.arg): _tuples(ast.literal_eval(k.value)) for k in call.keywords if k.arg}
        if len(named) < len(call.keywords):
            raise ValueError("** is not understood")
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"{text}: wanted plain numbers, strings and tuples as settings; {_known()}") from error
    make = SCHEMES[name]
    try:
        settings = inspect.signature(make).bind(*given, **named).arguments
    except TypeError as error:
        raise ValueError(f"{text}: {error}; wanted {_usage(name)}") from error
    for setting, hint in typing.get_type_hints(make).items():
        if setting in settings and not _fits(settings[setting], hint):
            wanted = getattr(hint, "__name__", str(hint))
            raise ValueError(f"{text}: wanted {setting}: {wanted}; got {settings[setting]!r}; {_usage(name)}")
    try:
        return make(**settings)
    except ValueError as error:
        raise ValueError(f"{text}: {error}") from error


def format_scheme(scheme: Scheme) -> str:
    """The text that `parse_scheme` reads back as an equal scheme; settings at their defaults are left out.

    Raises:
        ValueError: a scheme that is not in `SCHEMES`.

    Example:
        >>> format_scheme(Levels((-1, 0, 1), scale=True, per="channel"))
        "Ternary(per='channel')"
    """
    name = type(scheme).__name__
    if not dataclasses.is_dataclass(scheme) or SCHEMES.get(name) is not type(scheme):
        raise ValueError(f"wanted a scheme that has a text; got {scheme!r}; {_known()}")
    settings = {field.name: getattr(scheme, field.name) for field in dataclasses.fields(scheme) if field.init}
    if isinstance(scheme, Levels):
        name, settings = _family(scheme, settings)
    words = []
    for parameter in inspect.signature(SCHEMES[name]).parameters.values():
        value = settings[parameter.name]
        if parameter.default is parameter.empty:
            words.append(_literal(value))
        elif value != parameter.default or type(value) is not type(parameter.default):
            words.append(f"{parameter.name}={_literal(value)}")
    return f"{name}({', '.join(words)})"


def parse_rule(text: str) -> Rule:
    """The rule of "PATTERN=SCHEME", "PATTERN=SCHEME; joint", "PATTERN=SCHEME; stacked=N" or "PATTERN=None".

    The pattern ends at the last "=" that a scheme's name follows, so both sides may contain others.

    Raises:
        ValueError: no pattern, no scheme, or an unknown option.

    Example:
        >>> parse_rule("(.*/)?kernel=Cast('bfloat16'); stacked=1")
        Rule(pattern='(.*/)?kernel', scheme=Cast(format='bfloat16'), joint=False, stacked=1)
    """
    for found in reversed(list(_RULE.finditer(text))):
        scheme, *options = _split(text[found.end() :])
        named = _NAMED.fullmatch(scheme)
        if named and _plain(named[1]) in {*_SPELLINGS, "none"}:
            break
    else:
        raise ValueError(f"wanted PATTERN=SCHEME, such as '(.*/)?kernel=KMeans(4)'; got {text!r}; {_known()}")
    chosen: dict[str, Any] = {}
    for option in options:
        key, _, value = (part.strip() for part in option.partition("="))
        if key == "joint" and not value:
            chosen["joint"] = True
        elif key == "stacked" and value.isascii() and value.isdigit():
            chosen["stacked"] = int(value)
        else:
            raise ValueError(f"{text}: wanted '; joint' or '; stacked=N' after the scheme; got {option.strip()!r}")
    nothing = _plain(scheme.strip()) == "none"
    return Rule(text[: found.start()].strip(), None if nothing else parse_scheme(scheme), **chosen)


def format_rule(rule: Rule) -> str:
    """The text that `parse_rule` reads back as an equal rule.

    Example:
        >>> format_rule(Rule("a|b", KMeans(4), joint=True))
        'a|b=KMeans(4); joint'
    """
    if rule.scheme is not None:
        format_scheme(rule.scheme)  # raises if it has no text
    return f"{rule.pattern}={_right_side(rule)}"


def dry_run(params: Any, rules: Sequence[Rule]) -> Table:
    """Which leaf goes where under `rules`, and what it will cost. Nothing is computed.

    Args:
        params: a tree of arrays or shape structs.
        rules: as for `compress`.

    Returns:
        The table of the tree that `compress` would give, with the rule and scheme of every leaf.

    Raises:
        ValueError: as `compress` does, for rules and shapes.
    """
    tasks = resolve(rules, params)
    leaves, structure = flatten(params)
    forms = [jax.eval_shape(_traceable(task).project, _shapes(take(leaves, task))) for task in tasks]
    decided = {path: rule for path in leaves if (rule := _decides(rules, path))}

    def with_rule(row: Row) -> Row:
        rule = decided.get(row.path)
        if rule is None:
            return row
        return row._replace(rule=rule.pattern, scheme=_right_side(rule))

    return Table(tuple(map(with_rule, rows(replace(structure, leaves, tasks, forms)))))


def _shapes(xs: tuple[Any, ...]) -> tuple[jax.ShapeDtypeStruct, ...]:
    return tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in xs)


def _traceable(task: Task) -> Task:
    """A solver on the host cannot be traced; its plain twin gives forms of the same shapes."""
    scheme: Any = task.scheme
    return dataclasses.replace(task, scheme=dataclasses.replace(scheme, exact=False)) if scheme.host else task


def _decides(rules: Sequence[Rule], path: str) -> Rule | None:
    return next((rule for rule in rules if re.fullmatch(rule.pattern, path)), None)


# Text

_RULE = re.compile(r"=\s*(?=[A-Za-z_])")
_NAMED = re.compile(r"(?:lcq\.)?(\w+)\s*(?:\(.*\))?\s*", re.DOTALL)


def _plain(name: str) -> str:
    return name.lower().replace("_", "")


_SPELLINGS = {_plain(name): name for name in SCHEMES}


def _split(text: str) -> list[str]:
    """A scheme and its options, apart at the semicolons outside of parentheses."""
    end = text.rfind(")") + 1
    first, *rest = text[end:].split(";")
    return [text[:end] + first, *rest]


def _right_side(rule: Rule) -> str:
    """What follows the "=" of a rule; a scheme of the user's own, which has no text, is its repr."""
    known = rule.scheme is not None and SCHEMES.get(type(rule.scheme).__name__) is type(rule.scheme)
    scheme = format_scheme(rule.scheme) if rule.scheme is not None and known else repr(rule.scheme)
    return scheme + "; joint" * rule.joint + f"; stacked={rule.stacked}" * (rule.stacked > 0)


def _usage(name: str) -> str:
    words = []
    for parameter in inspect.signature(SCHEMES[name]).parameters.values():
        bare = parameter.default is parameter.empty
        words.append(parameter.name if bare else f"{parameter.name}={parameter.default!r}")
    return f"{name}({', '.join(words)})"


def _known() -> str:
    return f"known schemes: {', '.join(map(_usage, SCHEMES))}"


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _fits(value: Any, hint: Any) -> bool:
    """Whether a literal is of an annotated type; True is no int, an int is a float."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, each) for each in arguments)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(each, arguments[0]) for each in value)
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    return isinstance(value, hint)


def _literal(value: Any) -> str:
    """repr, with whole floats as ints: every scheme takes either."""
    if isinstance(value, tuple):
        return f"({', '.join(map(_literal, value))}{',' * (len(value) == 1)})"
    return repr(int(value)) if isinstance(value, float) and value.is_integer() and abs(value) < 1e6 else repr(value)


def _family(scheme: Levels, settings: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name and settings by which a user would ask for these levels."""
    if not scheme.exact:
        shared: dict[str, Any] = {"scale": scheme.scale, "per": scheme.per}
        c = len(scheme.values) // 2 - 1
        if scheme == Binary(**shared):
            return "Binary", shared
        if scheme == Ternary(**shared):
            return "Ternary", shared
        if 0 <= c <= 126 and scheme == PowersOfTwo(c, **shared):
            return "PowersOfTwo", {"c": c, **shared}
    return "Levels", settings
