"""Products that read codes: words one by one, Pallas on TPU and GPU, or tiles, whichever is best where it runs."""

import abc
import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lcq.forms.base import Form
from lcq.forms.columns import SELECT, Columns
from lcq.forms.meshes import is_shared, varied
from lcq.kernels import codes_xla
from lcq.kernels.base import KERNELS
from lcq.kernels.codes_xla import OfCodes
from lcq.kernels.words_xla import FEW, word_by_word
from lcq.tracing import jaxpr


@KERNELS.register("codes")
class CodeProduct(OfCodes):
    """Few rows by words, where they can be; bits by Pallas on TPU and GPU; else tiles."""

    def suits(self, form: Form) -> bool:
        return isinstance(form, Columns)

    def way(self, form: Any, rows: int) -> str:
        return "words" if by_words(form) and jaxpr.at_most(rows, FEW) else "tiles"

    def product(self, x: Array, form: Any) -> Array:
        if self.way(form, x.shape[0]) == "words" or _is_bits(form):
            return code_product(x, form)
        return codes_xla.matrix_product(x, form)


@KERNELS.register("words")
class Words(OfCodes):
    """Levels with equal steps, or few, a word of each column at a time."""

    name = "words"

    def check(self, form: Form) -> None:
        super().check(form)
        assert isinstance(form, Columns)
        if not by_words(form):
            raise ValueError(
                f"the kernel {self.name!r} wants levels with equal steps or at most {SELECT} of them, got a codebook "
                f"of {form.levels.shape[-2]}; leave kernel= out"
            )

    def product(self, x: Array, form: Any) -> Array:
        return code_product(x, form, self.name)


class _Pallas(Words):
    """Bits, unpacked in the kernel."""

    def check(self, form: Form) -> None:
        super().check(form)
        assert isinstance(form, Columns)
        if not _is_bits(form):
            raise ValueError(f"the kernel {self.name!r} wants codes of 1 bit, got {form.width} bits; leave kernel= out")


@KERNELS.register("pallas_tpu")
class PallasTPU(_Pallas):
    """Bits on TPU."""

    name = "pallas_tpu"


@KERNELS.register("pallas_gpu")
class PallasGPU(_Pallas):
    """Bits on GPU."""

    name = "pallas_gpu"


class CompiledKernel(OfCodes):
    """A kernel of codes for one platform, of which JAX knows only that it can be called, as by `jax.ffi`.

        y = x Delta(form),   in float32

    It is given its rules here: gradients are taken by tiles, and rows that are mapped are more rows. On other
    platforms, where the compiler shares out the work among devices, and in exported programs, which have to run where
    it is not installed, the kernel `codes` takes its place.

    Example:
        >>> import jax.numpy as jnp, lcq
        >>> @KERNELS.register("plain")
        ... class Plain(CompiledKernel):
        ...     def compute(self, x, form):
        ...         return x @ form.matrix()
        >>> lcq.kernels.matmul(jnp.ones(3), lcq.KMeans(2).project(jnp.ones((3, 2))), kernel="plain").tolist()
        [3.0, 3.0]
        >>> KERNELS.unregister("plain")
    """

    platform: ClassVar[Literal["cpu", "cuda", "tpu"]] = "cpu"

    @abc.abstractmethod
    def compute(self, x: Float[Array, "m k"], form: Columns) -> Float[Array, "m n"]:
        """x Delta(form), of real x in any dtype, of at least one row."""

    def way(self, form: Any, rows: int) -> str:
        here = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend()) == self.platform
        return super().way(form, rows) if here and not is_shared() else CodeProduct().way(form, rows)

    def product(self, x: Array, form: Any) -> Array:
        name = KERNELS.name_of(type(self))
        return CodeProduct().product(x, form) if is_shared() else code_product(x, form, name)


def by_words(form: Columns) -> bool:
    """Whether a form can be multiplied word by word."""
    return form.levels is None or form.levels.shape[-2] <= SELECT


def _is_bits(form: Columns) -> bool:
    return form.width == 1 and form.levels is None


def code_product(x: Float[Array, "m k"], form: Columns, kernel: str | None = None) -> Float[Array, "m n"]:
    """y = x Delta(form) in float32; under vmap over x alone, the rows of all are one product."""
    if kernel is None and is_shared():
        kernel = _anywhere(x, form)
    named = {name: a for name in _NUMBERS if (a := getattr(form, name)) is not None}
    bind = _primitive(tuple(named)).bind
    return bind(x, *named.values(), lowest=form.lowest, width=form.width, kernel=kernel)


_NUMBERS = ("words", "first", "step", "levels", "zero")


def _anywhere(x: Array, form: Columns) -> str:
    return CodeProduct().way(form, x.shape[0])


@functools.cache
def _primitive(names: tuple[str, ...]) -> Any:
    """The product with a form of arrays by these names, as a primitive."""

    def form_of(x: Array, arrays: Sequence[Array], static: dict[str, Any]) -> Columns:
        fields: dict[str, Any] = dict(zip(names, arrays, strict=True))
        fields |= {name: static[name] for name in ("lowest", "width")}
        return Columns(**fields, tail=(x.shape[-1], arrays[0].shape[-1]), axes=(0, 1))

    def compute(x: Array, *arrays: Array, **static: Any) -> Array:
        return _product(x, form_of(x, arrays, static), static["kernel"])

    def along_x(tangent: Array, x: Array, *arrays: Array, **static: Any) -> Array:
        return codes_xla.matrix_product(tangent, form_of(x, arrays, static))

    def along(i: int) -> Callable[..., Array] | None:
        def change(tangent: Array, x: Array, *arrays: Array, **static: Any) -> Array:
            def product(a: Array) -> Array:
                return codes_xla.matrix_product(x, form_of(x, [*arrays[:i], a, *arrays[i + 1 :]], static))

            return jax.jvp(product, (arrays[i],), (tangent,))[1]

        return None if names[i] == "words" else change

    def mapped(operands: Sequence[Array], axes: Sequence[int | None], **static: Any) -> tuple[Array, int]:
        def product(x: Array, *arrays: Array) -> Array:
            form = form_of(x, arrays, static)
            return code_product(x, form, static["kernel"])

        pairs = zip(operands, axes, strict=True)
        arrays = [a if axis is None else jnp.moveaxis(a, axis, 0) for a, axis in pairs]
        return _each(product, arrays, [axis is not None for axis in axes]), 0

    def shape(x: Any, words: Any, *_: Any) -> tuple[tuple[int, int], Any]:
        return (x.shape[0], words.shape[-1]), jnp.float32

    def exported(x: Array, *arrays: Array, **static: Any) -> Array:
        kernel = None if _compiled(static["kernel"]) else static["kernel"]
        return _product(x, form_of(x, arrays, static), kernel)

    slopes = [along_x, *map(along, range(len(names)))]
    return jaxpr.primitive("code_product", compute, shape, slopes, mapped, exported)


def _compiled(kernel: str | None) -> CompiledKernel | None:
    """The kernel of a name, if it is one that JAX cannot look into."""
    how = None if kernel is None else KERNELS[kernel]()
    return how if isinstance(how, CompiledKernel) else None


def _product(x: Array, form: Columns, kernel: str | None) -> Array:
    how: dict[str, Callable[[Array, Columns], Array]] = {"words": word_by_word, "tiles": codes_xla.matrix_product}
    anywhere = how[_anywhere(x, form)]
    if kernel in how:
        return how[kernel](x, form)
    if (made := _compiled(kernel)) is not None:

        def here(x: Array, form: Columns) -> Array:
            return varied(made.compute(x, form), x)

        return jax.lax.platform_dependent(x, form, default=anywhere, **{made.platform: here})
    taken = _is_bits(form) and x.dtype in (jnp.float32, jnp.bfloat16) and jaxpr.is_known(x.shape)
    if kernel is None and not taken:
        return anywhere(x, form)  # what the Pallas kernels do not take
    tpu, gpu = (functools.partial(bits_by_block, pallas.bit_product) for pallas in pallas_kernels())
    if kernel is not None:
        return (tpu if kernel == "pallas_tpu" else gpu)(x, form)
    return jax.lax.platform_dependent(x, form, tpu=tpu, cuda=gpu, default=anywhere)


def bits_by_block(
    product: Callable[[Array, Array], Array], x: Float[Array, "m k"], form: Columns
) -> Float[Array, "m n"]:
    """sum over blocks b of first[b] sum(x[b]) + step[b] (x[b].code[b]).

    Args:
        product: (x [m, k], words [w, n]) -> x.code [m, n].
    """

    def block(y: Array, part: tuple[Array, ...]) -> tuple[Array, None]:
        x, words, first, step = part
        total = x.sum(1, keepdims=True, dtype=jnp.float32)
        return y + first * total + step * product(x, words), None

    cut = x.reshape(x.shape[0], -1, form.block).swapaxes(0, 1)
    nothing = varied(jnp.zeros((x.shape[0], form.columns), jnp.float32), x)
    return jax.lax.scan(block, nothing, (cut, form.words, *form.lines()))[0]


_RowsAndWords = Callable[..., Array]
"""A product of rows of numbers with words down the columns, and what else there is of these."""


def pallas_kernels() -> tuple[ModuleType, ModuleType]:
    """The kernels for TPU and GPU."""
    from lcq.kernels import pallas_gpu, pallas_tpu  # here, as they take a sixth of the time of `import lcq`

    return pallas_tpu, pallas_gpu


def mapped_over_rows(product: _RowsAndWords) -> _RowsAndWords:
    """A product of rows and words; mapped over rows alone it has more rows."""
    mapped = jax.custom_batching.custom_vmap(product)

    @mapped.def_vmap
    def _(size: int, batched: Sequence[bool], *arrays: Array) -> tuple[Array, bool]:
        del size
        return _each(mapped, arrays, batched), True

    return mapped


def _each(product: _RowsAndWords, arrays: Sequence[Array], mapped: Sequence[bool]) -> Array:
    """The products of several; those of other rows alone are one product of more rows."""
    rows, *others = arrays
    if not any(mapped[1:]):
        y = product(rows.reshape(-1, rows.shape[-1]), *others)
        return y.reshape(*rows.shape[:-1], y.shape[-1])

    def one(some: list[Array]) -> Array:
        its = iter(some)
        return product(*(next(its) if many else a for a, many in zip(arrays, mapped, strict=True)))

    return jax.lax.map(one, [a for a, many in zip(arrays, mapped, strict=True) if many])
