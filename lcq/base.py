"""The two nouns of lcq: `Form`, what is stored, and `Scheme`, how an array becomes one."""

import abc
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Self, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lcq.axes import block_lengths
from lcq.blocks import Per, block_counts, compute_dtype
from lcq.dtypes import native, own_promotion
from lcq.registry import register_node


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


class Scheme(abc.ABC):
    """How arrays become forms: the C step Pi(x) = argmin_Theta sum_i h_i (x_i - Delta_i(Theta))^2 + (2/mu) C(Theta).

    The weights h are one unless they are given. Subclasses are frozen dataclasses whose settings are hashable, so that
    a scheme can be static under jit.

    Attributes:
        leafwise: at most how many leaf-shaped arrays (`leafwise()` fields) its working forms hold.
        host: whether `solve` needs concrete arrays (an exact solver in float64 outside of any trace).
        costly: whether C(Theta) is not zero; then `mu` is required, and there is no direct compression.
    """

    @property
    def leafwise(self) -> int:
        return 1

    @property
    def host(self) -> bool:
        return False

    @property
    def costly(self) -> bool:
        return False

    @functools.partial(jax.jit, static_argnums=0)
    def _compiled(self, xs: tuple[Array, ...], previous: Any, mu: Any, *weights: Any) -> tuple[Form, ...]:
        """`solve`, compiled once for all leaves of equal shapes."""
        return self.solve(xs, previous, mu, *weights)

    @abc.abstractmethod
    def check(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError if a leaf of this shape cannot be projected."""

    def check_numbers(self, x: Array) -> None:
        """Raises ValueError if a concrete leaf cannot be projected for what its numbers are."""
        del x

    @abc.abstractmethod
    def solve(
        self,
        xs: tuple[Array, ...],
        previous: tuple[Form, ...] | None,
        mu: Any,
        weights: tuple[Array, ...] | None = None,
    ) -> tuple[Form, ...]:
        """The C step for arrays that share one Theta; `previous` is a warm start of the same structure.

        `weights` are as `check_weights` returns them; they are passed only if a caller has given some.
        """

    @property
    def cuts(self) -> tuple[Per, ...]:
        """What of its settings cuts a leaf into blocks along its axes."""
        return ()

    def oriented(self, layout: str, rank: int) -> "Scheme":
        """This scheme for leaves of `rank` axes with another layout, see `lcq.axes`.

        Raises:
            ValueError: a layout for which it has no projection.
        """
        del layout, rank
        return self

    def cost(self, forms: tuple[Form, ...]) -> Any:
        """C(Theta); zero for schemes that are constraints."""
        del forms
        return 0.0

    def charge(self, forms: tuple[Form, ...], mu: Any) -> Any:
        """What is paid beside the distance, in its units, so that the C step minimises both: (2/mu) C(Theta)."""
        return 2 * self.cost(forms) / mu if self.costly else 0.0

    @own_promotion()
    def project(self, x: Any, previous: Any = None, *, mu: Any = None, weights: Any = None) -> Any:
        """Projects an array, or several arrays onto one shared Theta.

            Pi(x) = argmin_Theta sum_i h_i (x_i - Delta_i(Theta))^2 + (2/mu) C(Theta)

        Args:
            x: a floating-point array, or a tuple of such arrays that share one codebook or budget.
            previous: an earlier result for the same shapes, as a warm start.
            mu: the penalty weight; needed by schemes with a cost, ignored by others.
            weights: h >= 0, an array that broadcasts against x, or a tuple of them for a tuple; None for ones. For
                instance h of shape (inputs, 1), the mean square of every input of a layer, for the error that its
                outputs make. Only ratios within a block that shares a codebook matter (with a price too, as in
                `KMeans(rate=)`, their size); a block whose h are all zero counts as unweighted, and so do schemes that
                choose nothing but the nearest number.

        Returns:
            A form in the working layout for an array; a tuple of forms for a tuple.

        Raises:
            ValueError: a shape, dtype or setting that has no projection; weights that are negative, not finite, or do
                not broadcast.
        """
        single = not isinstance(x, tuple)
        xs = tuple(map(native, (x,) if single else x))
        if previous is not None and single:
            previous = (previous,)
        if self.costly and mu is None:
            raise ValueError(f"{self} has a cost: pass mu=, the weight of the distance it is traded against")
        for array in xs:
            if not jnp.issubdtype(array.dtype, jnp.floating):
                raise ValueError(f"wanted a floating-point array; got {array.dtype}{list(array.shape)}")
            if array.size == 0:
                raise ValueError(f"wanted at least one weight; got {array.dtype}{list(array.shape)}")
            self.check(array.shape)
            if not isinstance(array, jax.core.Tracer):
                self.check_numbers(jnp.asarray(array))
            if self.host and isinstance(array, jax.core.Tracer):
                raise ValueError(
                    f"{self} is solved on the host and cannot run under jit; call it on concrete arrays "
                    "(lcq.compress, or lcq.lc(every=None) with lcq.c_step), or choose exact=False"
                )
        given: tuple[Any, ...] = ()
        if weights is not None:
            given = (check_weights(xs, (weights,) if single else weights),)
            if self.host and any(isinstance(h, jax.core.Tracer) for h in given[0]):
                raise ValueError(f"{self} is solved on the host: wanted concrete weights; got traced ones")
        forms = (self.solve if self.host else self._compiled)(xs, previous, mu, *given)
        return forms[0] if single else forms


class Quantizer(Scheme):
    """A scheme whose forms are `Codes`: every element is an index into a codebook, one for each block of the leaf.

    Attributes:
        per: what shares one codebook or scale, see `lcq.blocks.block_counts`.
    """

    per: Per

    def check(self, shape: tuple[int, ...]) -> None:
        block_counts(self.per, shape)

    @property
    def cuts(self) -> tuple[Per, ...]:
        return (self.per,)

    def oriented(self, layout: str, rank: int) -> "Scheme":
        same: Any = self  # a dataclass, as all schemes are
        if self.per is None:
            return self
        changes: dict[str, Any] = {"per": block_lengths(self.per, layout, rank)}
        if isinstance(self.per, int) and getattr(same, "scale_dtype", "") is None:
            changes["scale_dtype"] = "bfloat16"  # what None means in groups, which lengths no longer tell
        return dataclasses.replace(same, **changes)


@own_promotion()
def check_weights(xs: Sequence[Any], weights: Any) -> tuple[Any, ...]:
    """Weights of a projection, one array for each of `xs`, with as many axes as that, in float32 or wider; ones for
    weights that are all zero.

    Raises:
        ValueError: not one real array each that broadcasts against its leaf; negative, not finite, or above 2^126,
            which is seen of concrete arrays only.
    """
    if not isinstance(weights, tuple) or len(weights) != len(xs):
        got = f"{len(weights)} of them" if isinstance(weights, tuple) else type(weights).__name__
        raise ValueError(f"weights: wanted a tuple of {len(xs)} arrays; got {got}; pass one for each array of x")
    weights = tuple(map(native, weights))
    for h, x in zip(weights, xs, strict=True):
        if not hasattr(h, "dtype") or not any(jnp.issubdtype(h.dtype, t) for t in (jnp.floating, jnp.integer, bool)):
            got = str(h.dtype) if hasattr(h, "dtype") else type(h).__name__
            raise ValueError(f"weights: wanted an array of real numbers; got {got}; convert it with jnp.asarray")
        if h.ndim > x.ndim or any(n not in (1, m) for n, m in zip(h.shape[::-1], x.shape[::-1], strict=False)):
            raise ValueError(
                f"weights: wanted a shape that broadcasts to {list(x.shape)}; got {list(h.shape)}; "
                "one number for each row of a matrix has the shape (rows, 1)"
            )
        if not isinstance(h, jax.core.Tracer):
            with jax.ensure_compile_time_eval():
                low, high = float(h.min()), float(h.max())
            if not (low >= 0 and high <= 2.0**126):  # of more, XLA flushes the reciprocal to zero
                raise ValueError(
                    f"weights: wanted finite numbers >= 0, at most 8.5e37; got some from {low} to {high} "
                    f"in {h.dtype}{list(h.shape)}; clip them, or look where they come from"
                )
    some = functools.reduce(jnp.logical_or, [jnp.any(h > 0) for h in weights])
    return tuple(
        jnp.where(some, h, 1).astype(compute_dtype(x.dtype)).reshape((1,) * (x.ndim - h.ndim) + h.shape)
        for h, x in zip(map(jnp.asarray, weights), xs, strict=True)
    )


_F = TypeVar("_F", bound=Form)

FORMS: dict[str, type[Form]] = {}
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
    """`tree_form`, and a name that files may contain."""
    FORMS[cls.__name__] = cls = tree_form(cls)
    return cls


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


def straight_through(w: Float[Array, "..."], projected: Float[Array, "..."]) -> Float[Array, "..."]:
    """The value of `projected` with the gradient of `w`: w + stop_gradient(projected - w), exactly `projected`.

    Source: Bengio, Leonard & Courville, arXiv 1308.3432.
    """
    return jax.lax.stop_gradient(projected) + (w - jax.lax.stop_gradient(w))
