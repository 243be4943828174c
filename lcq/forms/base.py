"""`Form`: what is stored in place of an array, and how a class becomes one."""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, Self, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from lcq.forms.dtypes import own_promotion
from lcq.forms.meshes import spec_of
from lcq.forms.registry import Registry
from lcq.forms.relayout import MatrixView, Relayout
from lcq.forms.serialization import register_node

Decoding = Literal["never", "many rows", "always"]
"""For products of how many rows a form is decoded."""


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
    bits and is what a file contains. For products on the weights of a loaded net, `prepack` may make a third.

    What has to be written is abstract here. With that alone a form works everywhere; the other methods keep it from
    being made dense where it is moved, taken apart or multiplied, and say in tables what it is.

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

    @property
    def ranges(self) -> dict[str, int]:
        """Of a working form its leafwise fields that hold codes, by name: among how many levels, so that an optimizer
        state can keep them in few bits. A field that is not named here stays as it is."""
        return {}

    @abc.abstractmethod
    def dense(self) -> Array:
        """Delta(Theta), an array of `shape` and `dtype`."""

    @abc.abstractmethod
    def pack(self) -> Self:
        """The stored layout; the form itself if it is stored already. Host only.

        Of arrays that lie on the devices of several processes each of these packs the whole: all call it, or none.
        """

    @abc.abstractmethod
    def unpack(self) -> Self:
        """The working layout; the form itself if it is working already."""

    @abc.abstractmethod
    def check_stored(self) -> None:
        """Raises ValueError unless this is a stored layout that `dense()` can expand.

        For files, which anyone may have written: static fields have their annotated types, nothing else is certain.
        Arrays may be shape structs, so that a file is checked before anything is allocated.
        """

    def describe(self) -> str:
        """What is stored, in a few words for tables, such as "codes K=4, 8 scales"."""
        return type(self).__name__.lower()

    def one_per(self) -> str:
        """Along which axes scales, codebooks or groups are told apart, such as "axis 1"; "" for one in all."""
        return ""

    def relayout(self, change: Relayout) -> "Form | None":
        """The form of change.function(dense()), in either layout; None if it cannot be said without the dense array.

        As it is, for a change that is idle, and for forms whose arrays all have the leaf's shape in the working layout.
        """
        return self if change.idle else self._each_leafwise(change.function)

    def take_rows(self, rows: Int[Array, " R"]) -> "Form | None":
        """The form of dense()[rows], for rows that exist, in either layout; None likewise."""
        return self._each_leafwise(lambda a: a[rows])

    def unstack(self) -> "Form | None":
        """The forms of all rows of a leaf, their arrays stacked, as scan and vmap take them apart; None likewise."""
        return self._each_leafwise(lambda a: a)

    def prepack(self, view: MatrixView | None = None, *, traced: bool = False) -> "Form":
        """The form of a leaf of the same shape as products read it best; itself if that is so already.

        Args:
            view: the matrices that a leaf is multiplied as; None for a leaf [K, n], or stacked ones [.., K, n].
            traced: whether only what can be traced may be done, cheap beside one product; else it is done once, when
                a net is loaded, and may look at values on the host.
        """
        del view, traced
        return self

    def product(self, x: Array, matmul: Callable[[Array, Any], Array]) -> Array | None:
        """x dense(), of a leaf [K, n] or [G, K, n], in a better way than by the dense array; None if there is none.

        Args:
            x: activations [.., K], or [G, .., K].
            matmul: the product of activations with a form, as `lcq.kernels.matmul`.
        """
        del x, matmul
        return None

    @property
    def decoding(self) -> Decoding:
        """For products of how many rows kernels make the dense array, or parts of it."""
        return "always"

    def spec(self, mesh: Any) -> tuple[Any, ...]:
        """Along which axes of a mesh with explicit axes those of `dense()` lie; None for those that are on all devices.

        As its leafwise arrays do in the working layout.
        """
        del mesh
        arrays = [getattr(self, f.name) for f in dataclasses.fields(self) if f.metadata.get("leafwise")]
        whole = [a for a in arrays if a is not None and a.shape == self.shape]
        return spec_of(whole[0]) if whole else (None,) * len(self.shape)

    def _each_leafwise(self, change: Callable[[Any], Any]) -> "Form | None":
        form = self.unpack()
        given = [(f, getattr(form, f.name)) for f in dataclasses.fields(form) if not f.metadata.get("static")]
        given = [(field, array) for field, array in given if array is not None]
        if not all(field.metadata.get("leafwise") and array.shape == form.shape for field, array in given):
            return None
        return dataclasses.replace(form, **{field.name: change(jnp.asarray(array)) for field, array in given})


_F = TypeVar("_F", bound=Form)


FORMS: Registry[type[Form]] = Registry("forms", "import the package that registers it; a newer lcq may know it")
"""Every form by its name in files."""


_NUMERIC = (
    "dense",
    "pack",
    "unpack",
    "prepack",
    "relayout",
    "take_rows",
    "unstack",
    "product",
    "matrix",
    "take_columns",
)


@dataclass_transform(frozen_default=True, eq_default=False, field_specifiers=(static, leafwise, own))
def tree_form(cls: type[_F]) -> type[_F]:
    """Makes a class a frozen dataclass and a pytree, which jax.export and flax.serialization can write; its
    arithmetic is under `own_promotion`."""
    for name in _NUMERIC:
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


def split_leafwise(form: _F) -> tuple[tuple[Array, ...], _F]:
    """Takes the leaf-shaped arrays out of a working form and the forms in it; `join_leafwise` puts them back."""
    arrays: list[Array] = []
    rest = _map_leafwise(arrays.append, form)
    return tuple(arrays), rest


def join_leafwise(rest: _F, arrays: Sequence[Array]) -> _F:
    """Inverse of `split_leafwise`."""
    left = iter(arrays)
    return _map_leafwise(lambda _: next(left), rest)


def is_split(form: Form) -> bool:
    """Whether `split_leafwise` may have made this: a form with leafwise fields that holds nothing in any of them."""
    found: list[Any] = []
    _map_leafwise(found.append, form)
    return bool(found) and all(part is None for part in found)


def cast_masks(form: _F, dtype: Any) -> _F:
    """A working form with its masks, and those of the forms in it, in another dtype.

    Optimizer states hold masks as uint8, forms as bool: wrappers that mix states by arithmetic, such as
    `optax.contrib.sam`, leave a uint8 what it is and make an int32 of a bool, with which no C step can go on.
    """
    return _map_leafwise(lambda mask: mask.astype(dtype), form, kind="mask")


def narrowed(form: _F) -> _F:
    """A working form whose codes, and those of the forms in it, are integers of 4 bits where that is enough.

    Of 2 bits there are some too, on which libtpu 0.0.42 ends the process.
    """

    def inside(node: Any) -> Any:
        if isinstance(node, tuple):
            return tuple(map(inside, node))
        if not isinstance(node, Form):
            return node
        given = {f.name: getattr(node, f.name) for f in dataclasses.fields(node) if not f.metadata.get("static")}
        short = {name: given[name].astype(jnp.uint4) for name, levels in node.ranges.items() if levels <= 16}
        return dataclasses.replace(node, **{name: inside(value) for name, value in given.items()} | short)

    return inside(form)


def widened(array: Array) -> Array:
    """Codes in whole bytes, as forms hold them."""
    return array.astype(jnp.uint8) if array.dtype == jnp.uint4 else array


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
