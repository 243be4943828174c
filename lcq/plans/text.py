"""Schemes and rules as text: "KMeans(4, per='channel')" <-> `Scheme`, "PATTERN=SCHEME" <-> `Rule`."""

import ast
import dataclasses
import difflib
import inspect
import re
import types
import typing
from collections.abc import Callable
from typing import Any

from lcq.forms.validate import named
from lcq.schemes import SCHEMES
from lcq.schemes.base import Scheme
from lcq.tree.rules import Rule


def parse_scheme(text: str) -> Scheme:
    """The scheme that a text such as "KMeans(4, per='channel')" or "kmeans(k=4)" names.

    Only the schemes that `lcq.schemes.SCHEMES` knows and literals are understood, nothing is run; a setting may be a
    scheme itself. Names may be written in any case, with or without underscores and a leading "lcq."; lists count as
    tuples; a scheme without arguments needs no parentheses.

    Raises:
        ValueError: anything else, or settings that the scheme refuses; lists the schemes, or the
            settings of the one that is meant.

    Example:
        >>> parse_scheme("powers_of_two(3)")
        PowersOfTwo(scale=False, per=None, scale_dtype=None, c=3)
    """
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"expected a scheme, got {text!r}, which does not parse; {_known(text)}") from error
    if not _names_scheme(node):
        raise ValueError(f"expected a scheme, got {text!r}; {_known(text)}")
    try:
        return _made(node, text)
    except RecursionError as error:
        raise ValueError(f"{text}: expected fewer schemes inside each other") from error


def format_scheme(scheme: Scheme) -> str:
    """The text that `parse_scheme` reads back as an equal scheme; settings at their defaults are left out.

    Raises:
        ValueError: a scheme that is not in `SCHEMES`, or with one inside that is not.

    Example:
        >>> import lcq
        >>> format_scheme(lcq.Ternary(scale=True, per="channel"))
        "Ternary(per='channel')"
    """
    name = SCHEMES.name_of(type(scheme))
    if name is None or not has_text(scheme):
        raise ValueError(f"expected a scheme that has a text, got {scheme!r}; {_known()}")
    settings = settings_of(scheme)
    words: list[str] = []
    for parameter in inspect.signature(SCHEMES[name]).parameters.values():
        value = settings[parameter.name]
        if parameter.kind is parameter.VAR_POSITIONAL:
            words += map(_literal, value)
        elif parameter.default is parameter.empty and parameter.kind is not parameter.KEYWORD_ONLY:
            words.append(_literal(value))
        elif value != parameter.default or type(value) is not type(parameter.default):
            words.append(f"{parameter.name}={_literal(value)}")
    return f"{name}({', '.join(words)})"


def has_text(scheme: Scheme) -> bool:
    """Whether the class of a scheme is one of `SCHEMES`."""
    return dataclasses.is_dataclass(scheme) and SCHEMES.name_of(type(scheme)) is not None


def settings_of(scheme: Scheme) -> dict[str, Any]:
    """What a scheme was made with, by name."""
    made: Any = scheme  # a dataclass, as all schemes are
    return {field.name: getattr(scheme, field.name) for field in dataclasses.fields(made) if field.init}


def make(scheme: Callable[..., Scheme], settings: dict[str, object]) -> Scheme:
    """scheme(**settings), where a setting may also be the name of its `*args`."""
    bound = inspect.BoundArguments(inspect.signature(scheme), dict(settings))
    return scheme(*bound.args, **bound.kwargs)


def parse_rule(text: str) -> Rule:
    """The rule of "PATTERN=SCHEME", "PATTERN=SCHEME; joint", "..; stacked=N", "..; layout=oi" or "PATTERN=None".

    The pattern ends at the last "=" that a scheme's name follows, so both sides may contain others.

    Raises:
        ValueError: no pattern, no scheme, or an unknown option.

    Example:
        >>> parse_rule("(.*/)?kernel=Cast('bfloat16'); stacked=1")
        Rule(pattern='(.*/)?kernel', scheme=Cast(format='bfloat16'), joint=False, stacked=1, layout=None)
    """
    for found in reversed(list(_RULE.finditer(text))):
        scheme, *options = _split(text[found.end() :])
        named = _NAMED.fullmatch(scheme)
        inside = scheme.count("(") < scheme.count(")")  # of another scheme's parentheses
        if named and not inside and (is_none(named[1]) or _spelt(named[1])):
            break
    else:
        known = _known(_RULE.split(text, 1)[-1])
        raise ValueError(f"expected PATTERN=SCHEME, such as '(.*/)?kernel=KMeans(4)', got {text!r}; {known}")
    chosen: dict[str, Any] = {}
    for option in options:
        key, _, value = (part.strip() for part in option.partition("="))
        if key == "joint" and not value:
            chosen["joint"] = True
        elif key == "stacked" and value.isascii() and value.isdigit():
            chosen["stacked"] = int(value)
        elif key == "layout" and value:
            chosen["layout"] = value.strip("'\"")
        else:
            raise ValueError(
                f"{text}: expected '; joint', '; stacked=N' or '; layout=oi' after the scheme, got {option.strip()!r}"
            )
    return Rule(text[: found.start()].strip(), None if is_none(scheme) else parse_scheme(scheme), **chosen)


def format_rule(rule: Rule) -> str:
    """The text that `parse_rule` reads back as an equal rule.

    Example:
        >>> import lcq
        >>> format_rule(Rule("a|b", lcq.KMeans(4), joint=True))
        'a|b=KMeans(4); joint'
    """
    if rule.scheme is not None:
        format_scheme(rule.scheme)  # raises if it has no text
    return f"{rule.pattern}={right_side(rule)}"


def right_side(rule: Rule) -> str:
    """What follows the "=" of a rule; a scheme of the user's own, which has no text, is its repr."""
    scheme = format_scheme(rule.scheme) if rule.scheme is not None and has_text(rule.scheme) else repr(rule.scheme)
    layout = "" if rule.layout is None else f"; layout={rule.layout}"
    return scheme + "; joint" * rule.joint + f"; stacked={rule.stacked}" * (rule.stacked > 0) + layout


def is_none(scheme: str) -> bool:
    """Whether a text in the place of a scheme says that there is none."""
    return _plain(scheme.strip()) == "none"


# Text

_RULE = re.compile(r"=\s*(?=[A-Za-z_])")
_PLAIN = "expected plain numbers, strings, tuples and schemes as settings"
_NAMED = re.compile(r"(?:lcq\.)?(\w+)\s*(?:\(.*\))?\s*", re.DOTALL)


def _plain(name: str) -> str:
    return name.lower().replace("_", "")


def _spelt(name: str) -> str | None:
    """The scheme that is meant."""
    return next((known for known in SCHEMES if _plain(known) == _plain(name)), None)


def _split(text: str) -> list[str]:
    """A scheme and its options, apart at the semicolons outside of parentheses."""
    end = text.rfind(")") + 1
    first, *rest = text[end:].split(";")
    return [text[:end] + first, *rest]


def _usage(name: str) -> str:
    words = []
    for parameter in inspect.signature(SCHEMES[name]).parameters.values():
        star = "*" * (parameter.kind is parameter.VAR_POSITIONAL)
        bare = parameter.default is parameter.empty
        words.append(star + parameter.name if bare else f"{parameter.name}={parameter.default!r}")
    return f"{name}({', '.join(words)})"


def _known(text: str = "") -> str:
    """The schemes that there are, and the settings of the one whose name is nearest to that in front of a text."""
    names = {_plain(name): name for name in SCHEMES}
    given = re.match(r"\s*(?:lcq\.)?(\w+)", text)
    near = difflib.get_close_matches(_plain(given[1]), names, 1) if given else []
    return f"known schemes: {', '.join(SCHEMES)}" + "".join(f"; nearest: {_usage(names[name])}" for name in near)


def _names_scheme(node: ast.expr) -> str | None:
    """The scheme that an expression names, alone or called."""
    match node.func if isinstance(node, ast.Call) else node:
        case ast.Name(name) | ast.Attribute(ast.Name("lcq"), name):
            return _spelt(name)
    return None


def _made(node: ast.expr, text: str) -> Scheme:
    """The scheme of an expression that names one."""
    name, call = _names_scheme(node), node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    assert name is not None
    given = [_setting(argument, text, name) for argument in call.args]
    by_name = {str(k.arg): _setting(k.value, text, name) for k in call.keywords if k.arg}
    if len(by_name) < len(call.keywords):
        raise ValueError(f"{text}: {_PLAIN}; {_usage(name)}")
    scheme = SCHEMES[name]
    signature, hints = inspect.signature(scheme), typing.get_type_hints(scheme)
    try:
        settings = signature.bind(*given, **by_name).arguments
    except TypeError as error:
        raise ValueError(f"{text}: {error}; expected {_usage(name)}") from error
    for setting, value in settings.items():
        hint, several = hints.get(setting, Any), signature.parameters[setting].kind is inspect.Parameter.VAR_POSITIONAL
        if not (_fits(value, hint) or (several and all(_fits(each, hint) for each in value))):
            wanted = getattr(hint, "__name__", str(hint)) if isinstance(hint, type) else str(hint)
            raise ValueError(f"{text}: expected {setting}: {wanted}, got {value!r}; {_usage(name)}")
    with named(text):
        return make(scheme, settings)


def _setting(node: ast.expr, text: str, name: str) -> Any:
    """A literal, a scheme, or a tuple of such, as a setting of the scheme of a name."""
    if isinstance(node, ast.List | ast.Tuple):
        return tuple(_setting(each, text, name) for each in node.elts)
    if _names_scheme(node):
        return _made(node, text)
    if isinstance(node, ast.Name):
        raise ValueError(f'{text}: {_PLAIN}, got the name {node.id}; put it in quotes: "{node.id}"')
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"{text}: {_PLAIN}; {_usage(name)}") from error


def _fits(value: object, hint: Any) -> bool:
    """Whether a literal is of an annotated type; True is no int, an int is a float."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, each) for each in arguments)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(each, arguments[0]) for each in value)
    if origin is typing.Literal:
        return value in arguments
    if hint is Any:
        return True
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    return isinstance(value, hint)


def _literal(value: object) -> str:
    """repr, with whole floats in tuples as ints, as one would write levels."""
    if isinstance(value, Scheme):
        return format_scheme(value)
    if isinstance(value, tuple):
        whole = [int(v) if isinstance(v, float) and v.is_integer() and abs(v) < 1e6 else v for v in value]
        return f"({', '.join(map(_literal, whole))}{',' * (len(value) == 1)})"
    return repr(value.item() if hasattr(value, "item") else value)  # numpy's numbers have a repr of their own
