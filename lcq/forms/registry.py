"""`Registry`: what a name in a file, a text or an argument stands for, and how other packages add to it."""

import importlib.metadata
import threading
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

_T = TypeVar("_T")
_U = TypeVar("_U")


class Registry(Generic[_T]):
    """Things of one kind by name, in the order in which they were registered.

    lcq has one for each kind that another package can define: forms, schemes, rounding methods, kernels, codecs,
    checkpoint formats. Its own are registered the same way.

    Args:
        kind: what these are, in the plural, for errors.
        remedy: what to do about an unknown name.
        group: entry points of installed packages that register more; they are loaded when first a name is looked for.

    Example:
        >>> SHAPES = Registry("shapes")
        >>> @SHAPES.register("square")
        ... def area(x):
        ...     return x * x
        >>> SHAPES["square"](3), list(SHAPES), "circle" in SHAPES
        (9, ['square'], False)
        >>> SHAPES["circle"]
        Traceback (most recent call last):
        ...
        ValueError: expected one of the shapes square, got 'circle'; import the package that registers it
    """

    def __init__(
        self, kind: str, remedy: str = "import the package that registers it", group: str | None = None
    ) -> None:
        self.kind, self.remedy = kind, remedy
        self._known: dict[str, _T] = {}
        self._group, self._loading = group, threading.RLock()

    def register(self, name: str) -> Callable[[_U], _U]:
        """A decorator that gives a name to a class or function, which it returns as it is.

        The same definition may come again, as when a cell of a notebook is run twice; the newer one then counts.

        Raises:
            ValueError: no name, or one that stands for another thing already.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"expected a name for one of the {self.kind}, got {name!r}; pass a string")

        def add(thing: Any) -> Any:
            old = self._known.get(name)
            if old is not None and _home(old) != _home(thing):
                raise ValueError(
                    f"expected a name that is free among the {self.kind}, got {name!r}, which is {_home(old)}; "
                    "choose another"
                )
            self._known[name] = thing
            return thing

        return add

    def unregister(self, name: str) -> None:
        """Frees a name, as after a test.

        Raises:
            ValueError: a name that is not known.
        """
        self[name]
        del self._known[name]

    def __getitem__(self, name: Any) -> _T:
        if name not in self:
            raise ValueError(
                f"expected one of the {self.kind} {', '.join(self._known)}, got {str(name)[:80]!r}; {self.remedy}"
            )
        return self._known[name]

    def name_of(self, thing: Any) -> str | None:
        """The name that a thing is registered under; None if it is not."""
        return next((name for name, known in self._all().items() if known is thing), None)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._all()

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def __repr__(self) -> str:
        return f"Registry({self.kind}: {', '.join(self._all())})"

    def _all(self) -> dict[str, _T]:
        """With what the entry points register, which look for names themselves while they are loaded."""
        with self._loading:
            group, self._group = self._group, None
            for point in importlib.metadata.entry_points(group=group) if group else ():
                point.load()
        return self._known


def _home(thing: Any) -> str:
    """Where a class or function is defined."""
    made = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{made.__module__}.{made.__qualname__}"
