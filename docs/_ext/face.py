"""The directive `face`: what `import lcq` gives, a line each, with a link to where it is described."""

import inspect
from typing import Any

from docutils import nodes
from plain_docstrings import restructured
from sphinx.util.docutils import SphinxDirective

import lcq


def setup(app: Any) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_directive("face", Face)
    return {"parallel_read_safe": True}


def homes() -> dict[str, str]:
    """The namespace that lists each name of the face."""
    namespaces = {name: getattr(lcq, name) for name in lcq.__all__ if inspect.ismodule(getattr(lcq, name))}
    return {
        name: space.__name__
        for name in lcq.__all__
        for space in namespaces.values()
        if name in getattr(space, "__all__", ()) and getattr(space, name) is getattr(lcq, name)
    }


class Face(SphinxDirective):
    """A table of the face's functions and classes."""

    def run(self) -> list[nodes.Node]:
        rows = ["```{eval-rst}", ".. list-table::", "   :widths: 25 75", ""]
        for name, home in homes().items():
            line = (inspect.getdoc(getattr(lcq, name)) or "").split("\n\n")[0].replace("\n", " ")
            rows += [f"   * - :py:obj:`lcq.{name} <{home}.{name}>`", f"     - {restructured([line])[0]}"]
        return self.parse_text_to_nodes("\n".join([*rows, "```"]))


def check() -> None:
    """Every name of the face has a home."""
    lost = [n for n in lcq.__all__ if not n.startswith("_") and not inspect.ismodule(getattr(lcq, n))]
    lost = [n for n in lost if n not in homes()]
    if lost:
        raise ValueError(f"expected every name of lcq in a namespace's __all__, got {lost} in none")


check()
