"""What following and running equations of a jaxpr asks of them, and names of what goes in and out."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from typing_extensions import TypeAliasType

Content = TypeAliasType("Content", Any)
"""What a variable holds while equations run: an array, a form, a mask of places, or whatever the rules understand."""

Body = TypeAliasType("Body", Any)
"""A jaxpr, closed or not."""


@runtime_checkable
class Variable(Protocol):
    """What an equation reads or makes; a literal, which has its value as `val`, is one too."""

    @property
    def aval(self) -> Content: ...


@runtime_checkable
class Primitive(Protocol):
    """The operation of an equation, as jax names and runs it."""

    name: str
    multiple_results: bool

    def bind(self, *arrays: Content, **params: Content) -> Content: ...

    def get_bind_params(self, params: Mapping[str, Content]) -> dict[str, Content]: ...


@runtime_checkable
class Equation(Protocol):
    """An equation of a jaxpr."""

    @property
    def primitive(self) -> Primitive: ...

    @property
    def invars(self) -> Sequence[Variable]: ...

    @property
    def outvars(self) -> Sequence[Variable]: ...

    @property
    def params(self) -> Mapping[str, Content]: ...

    @property
    def effects(self) -> Collection[object]: ...

    @property
    def source_info(self) -> Content: ...


Frame = TypeAliasType("Frame", tuple[Any, ...])
"""The calls around an equation, which tell apart its uses in each of them."""
