"""`Form`: what is stored in place of an array, and how a class becomes one."""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Self, TypeVar, dataclass_transform

import jax
from jaxtyping import Array

from lcq.forms.dtypes import own_promotion
from lcq.forms.registry import Registry
from lcq.forms.serialization import register_node


def static(**kwargs: Any) -> Any:
    """A dataclass field that is part of the tree's structure."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


def leafwise(*, mask: bool = False) -> Any:
    """A dataclass field that has the compressed leaf's shape in the working layout; a mask is one of bools."""
    return dataclasses.field(metadata={"leafwise": True, "own": True, "mask": mask})


def own(**kwargs: Any) -> Any:
    """A dataclass field that belongs to one leaf alone, also in a joint task, and has a shape of its own."""
    return dataclasses.field(metadata={"own": True}, **kwargs)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Form(abc.ABC):
    """What is stored in place of an array: a pytree Theta whose `dense()` is Delta(Theta).

    A form has two layouts with equal `dense()`. The *working* layout, made by a scheme, holds arrays of fixed
    shape and is legal under jit, cond, vmap and scan. The *stored* layout, made by `pack()` on the host, holds packed
    bits and is what a file contains.

    Subclasses are final, frozen dataclasses registered by `register_form`. Fields made by `static()` are part of the
    tree's structure; fields made by `leafwise()` have the shape of the compressed leaf in the working layout, so an
    optimizer state can shard them like the leaf; fields made by `own()` belong to one leaf too. What the leaves of a
    joint task have in common is in the others. A constructor checks nothing: jax calls it on every unflatten.

    Attributes:
        dtype: of `dense()`.
        shared: a name that all leaves of a joint task carry; what they have in common (`shared_bits`) is stored once.
    """

    dtype: str = static(default="float32")
    shared: str | None = static(default=None)

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of `dense()`."""

    @property
    @abc.abstractmethod
    def bits(self) -> int:
        """Cost of Theta in bits: codes at their fixed width, codebooks, scales; `shared_bits` included."""

    @property
    def shared_bits(self) -> int:
        """Bits of what the leaves of a joint task have in common, such as their codebook."""
        return 0

    @property
    def alphabets(self) -> dict[str, tuple[int, int]]:
        """Of a stored form the fields that hold packed codes, by name: among how many levels, and how many codes.

        An entropy coder takes these; codes lie in row-major order.
        """
        return {}

    @abc.abstractmethod
    def dense(self) -> Array:
        """Delta(Theta), an array of `shape` and `dtype`."""

    @abc.abstractmethod
    def pack(self) -> Self:
        """The stored layout; the form itself if it is stored already. Host only."""

    @abc.abstractmethod
    def unpack(self) -> Self:
        """The working layout; the form itself if it is working already."""

    @abc.abstractmethod
    def check_stored(self) -> None:
        """Raises ValueError unless this is a stored layout that `dense()` can expand.

        For files, which anyone may have written: static fields have their annotated types, nothing else is certain.
        Arrays may be shape structs, so that a file is checked before anything is allocated.
        """


_F = TypeVar("_F", bound=Form)


FORMS: Registry[type[Form]] = Registry("forms", "import the package that registers it; a newer lcq may know it")
"""Every form by its name in files."""


@dataclass_transform(frozen_default=True, eq_default=False, field_specifiers=(static, leafwise, own))
def tree_form(cls: type[_F]) -> type[_F]:
    """Makes a class a frozen dataclass and a pytree, which jax.export and flax.serialization can write; its
    arithmetic is under `own_promotion`."""
    for name in ("dense", "pack", "unpack", "matrix", "take"):
        if name in vars(cls):
            setattr(cls, name, own_promotion()(vars(cls)[name]))
    cls = jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True, eq=False)(cls))
    return register_node(cls, tuple(f.name for f in dataclasses.fields(cls) if f.metadata.get("static")))


@dataclass_transform(frozen_default=True, eq_default=False, field_specifiers=(static, leafwise, own))
def register_form(cls: type[_F]) -> type[_F]:
    """`tree_form`, and a name that files may contain: that of the class, in `FORMS`."""
    return FORMS.register(cls.__name__)(tree_form(cls))


def is_form(node: Any) -> bool:
    """For `is_leaf=`: whether a tree node is a form."""
    return isinstance(node, Form)


def share(form: Form, name: str | None) -> Form:
    """The form, and those in it, as one of the leaves of the joint task `name`; None for no joint task."""

    def inside(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(inside, value))
        return share(value, name) if isinstance(value, Form) else value

    changed = {f.name: inside(getattr(form, f.name)) for f in dataclasses.fields(form) if not f.metadata.get("static")}
    return dataclasses.replace(form, **{**changed, "shared": name})


def split_leafwise(form: Form) -> tuple[tuple[Array, ...], Form]:
    """Takes the leaf-shaped arrays out of a working form and the forms in it; `join_leafwise` puts them back."""
    arrays: list[Array] = []
    rest = _map_leafwise(arrays.append, form)
    return tuple(arrays), rest


def join_leafwise(rest: Form, arrays: Sequence[Array]) -> Form:
    """Inverse of `split_leafwise`."""
    left = iter(arrays)
    return _map_leafwise(lambda _: next(left), rest)


def cast_masks(form: _F, dtype: Any) -> _F:
    """A working form with its masks, and those of the forms in it, in another dtype.

    Optimizer states hold masks as uint8, forms as bool: wrappers that mix states by arithmetic, such as
    `optax.contrib.sam`, leave a uint8 what it is and make an int32 of a bool, with which no C step can go on.
    """
    return _map_leafwise(lambda mask: mask.astype(dtype), form, kind="mask")


def _map_leafwise(f: Callable[[Any], Any], node: Any, kind: str = "leafwise") -> Any:
    """Applies f to the leafwise fields of a form and of the forms in it, in the order of fields; or to its masks."""
    if isinstance(node, tuple):
        return tuple(_map_leafwise(f, part, kind) for part in node)
    if not isinstance(node, Form):
        return node
    changed = {}
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if not field.metadata.get("static"):
            changed[field.name] = f(value) if field.metadata.get(kind) else _map_leafwise(f, value, kind)
    return dataclasses.replace(node, **changed)
