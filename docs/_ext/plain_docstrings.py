"""Shows lcq's docstrings, which are plain text: indented equations as they stand, names in backticks as code."""

import re
from typing import Any

_SECTION = re.compile(r"(Args|Attributes|Returns|Yields|Raises|Warns|Example|Source):$")
_CODE = re.compile(r"(`[^`]+`)")
_MARKUP = re.compile(r"([\\*|_])")


def setup(app: Any) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", process, priority=400)  # napoleon, at 500, splits the sections
    app.connect("autodoc-skip-member", skip)
    app.connect("autodoc-process-bases", leave_out_bases)
    app.connect("autodoc-process-signature", shorten)
    return {"parallel_read_safe": True}


def process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Makes reStructuredText of a plain docstring, in place."""
    del app, what, name, obj, options
    lines[:] = restructured(lines)


def skip(app: Any, what: str, name: str, obj: Any, skipped: bool, options: Any) -> bool | None:
    """Leaves out fields: of NamedTuples, and those whose default is a function. Their class's docstring has them."""
    del app, name, skipped, options
    field = type(obj).__name__ == "_tuplegetter" or (what == "class" and obj.__class__.__module__.startswith("jax"))
    return True if field else None


def leave_out_bases(app: Any, name: str, obj: Any, options: Any, bases: list[Any]) -> None:
    """Leaves bases of Python's own out, in place."""
    del app, name, obj, options
    bases[:] = [base for base in bases if base.__module__.startswith("lcq")]


def shorten(app: Any, what: str, name: str, obj: Any, options: Any, arguments: Any, returns: Any) -> Any:
    """Names of types as they are imported."""
    del app, what, name, obj, options
    return tuple(text and text.replace("jaxlib._jax.", "") for text in (arguments, returns))


def restructured(lines: list[str]) -> list[str]:
    """A docstring as reStructuredText.

    Paragraphs that are indented more than the text before them are literal blocks, doctests stay as they are, and
    everything else is text in which only backticks mean something.
    """
    out: list[str] = []
    section = ""
    base = 0
    literal: int | None = None
    for line in lines:
        text = line.strip()
        depth = len(line) - len(line.lstrip())
        if literal is not None and text and depth < literal:
            literal = None
        if not text or literal is not None:
            out.append(line)
            continue
        if depth == 0:
            found = _SECTION.match(text)
            section, base = (found[1], 4) if found else (section if section and depth else "", 0)
            if found:
                out.append(line)
                continue
        after_gap = not out or not out[-1].strip()
        if section == "Example":
            out.append(line if _in_doctest(out, text) else _escaped(line))
        elif after_gap and depth > base and section in ("", "Source"):
            out += [" " * base + "::", "", line]
            literal = depth
        else:
            out.append(_escaped(line))
    return out


def _in_doctest(before: list[str], text: str) -> bool:
    if text.startswith(">>>"):
        return True
    for line in reversed(before):
        if not line.strip():
            return False
        if line.strip().startswith(">>>"):
            return True
    return False


def _escaped(line: str) -> str:
    parts = _CODE.split(line)
    return "".join(f"`{p}`" if i % 2 else _MARKUP.sub(r"\\\1", p) for i, p in enumerate(parts))
