"""Plans: rules as one value, as TOML and inside a file."""

import dataclasses
import os
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

from lcq.io.atomic import replacing
from lcq.io.file import read_index
from lcq.plans.text import format_scheme, is_none, parse_scheme
from lcq.tree.rules import Rule, checked

_TEXT = re.compile(r"[^\n]*\n|\s*(?:\[\[|rule\s*=|#)")


_KEYS: dict[str, type] = {"pattern": str, "scheme": str, "joint": bool, "stacked": int, "layout": str}


@dataclasses.dataclass(frozen=True)
class Plan(Sequence[Rule]):
    """Rules in order of precedence, as one value: give it wherever rules are wanted, print it, keep it in a file.

    Its text is TOML, a [[rule]] for each with `pattern`, `scheme` ("None" for none) and, where they say something,
    `joint`, `stacked` and `layout`. `read_plan` gives back an equal plan, and `lcq.save(path, tree, plan=plan)` keeps
    it beside the forms.

    Attributes:
        rules: The rules; the first one that matches a leaf decides.

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
                f"{os.fspath(path)}: expected another name, such as plan.toml, got that of an .lcq file; "
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
        raise ValueError(f"expected TOML; {error}") from error
    match document:
        case {"rule": [*tables], **rest} if not rest:
            return Plan(tuple(_rule(number, table) for number, table in enumerate(tables, 1)))
    got = ", ".join(map(repr, document)) or "nothing"
    raise ValueError(f"expected [[rule]] tables with a pattern and a scheme, and nothing else, got {got[:200]}")


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
        raise ValueError(f"{name}: expected a plan in the file; it has none: save one with lcq.save(.., plan=plan)")
    try:
        return parse_plan(Path(path).read_bytes().decode("utf-8-sig") if text is None else text)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name}: expected a plan in TOML, or an .lcq file that has one, got no text: {error}"
        ) from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _toml(rule: Rule) -> str:
    """A rule as a [[rule]] table."""
    scheme = "None" if rule.scheme is None else format_scheme(rule.scheme)
    lines = ["[[rule]]", f"pattern = {_quoted(rule.pattern, literal=True)}", f"scheme = {_quoted(scheme)}"]
    lines += ["joint = true"] * rule.joint + [f"stacked = {rule.stacked}"] * (rule.stacked > 0)
    return "\n".join(lines if rule.layout is None else [*lines, f"layout = {_quoted(rule.layout)}"])


def _quoted(text: str, literal: bool = False) -> str:
    """A TOML string: without escapes if `literal` and possible, for patterns are full of backslashes."""
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError(f"{text!r}: expected Unicode characters, got half of a surrogate pair, which TOML cannot hold")
    if literal and text.isprintable() and "'" not in text:
        return f"'{text}'"
    words = (f"\\{c}" if c in '"\\' else c if c.isprintable() else f"\\U{ord(c):08x}" for c in text)
    return f'"{"".join(words)}"'


def _rule(number: int, table: object) -> Rule:
    """The rule of what TOML has in its place."""
    try:
        if not isinstance(table, dict):
            raise ValueError(f"expected a table, got {table!r:.200}")
        if odd := table.keys() - _KEYS.keys():
            raise ValueError(f"expected only {', '.join(_KEYS)}, got {', '.join(sorted(odd))[:200]!r}")
        for key, kind in _KEYS.items():
            if (key in table or key in ("pattern", "scheme")) and type(table.get(key)) is not kind:
                got = repr(table[key])[:200] if key in table else "none"
                raise ValueError(f"expected {key}: {kind.__name__}, got {got}")
        settings = {key: table[key] for key in ("joint", "stacked", "layout") if key in table}
        return Rule(table["pattern"], None if is_none(table["scheme"]) else parse_scheme(table["scheme"]), **settings)
    except (ValueError, OverflowError, RecursionError) as error:
        shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(error))  # it may quote a stranger's file
        raise ValueError(f"rule {number}: {shown}") from error
