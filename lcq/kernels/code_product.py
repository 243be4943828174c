"""Products that read codes: words one by one, Pallas on TPU and GPU, or tiles, whichever is best where it runs."""

import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from lcq.forms.base import Form
from lcq.forms.columns import Columns
from lcq.forms.meshes import is_shared
from lcq.kernels import codes_xla
from lcq.kernels.base import KERNELS
from lcq.kernels.codes_xla import OfCodes
from lcq.tracing import jaxpr


@KERNELS.register("codes")
class CodeProduct(OfCodes):
    """Levels with equal steps by code, where bits are multiplied or rows are few; else tiles."""

    def suits(self, form: Form) -> bool:
        return isinstance(form, Columns)

    def product(self, x: Array, form: Any) -> Array:
        few = form.width == 1 or jaxpr.at_most(x.shape[0], codes_xla.FEW)
        return by_code(x, form) if form.levels is None and few else codes_xla.matrix_product(x, form)


@KERNELS.register("words")
class Words(OfCodes):
    """Levels with equal steps, a word of each column at a time."""

    name = "words"

    def check(self, form: Form) -> None:
        super().check(form)
        assert isinstance(form, Columns)
        if form.levels is not None:
            raise ValueError(
                f"the kernel {self.name!r} wants levels with equal steps, got a codebook of {form.levels.shape[-1]}; "
                "leave kernel= out"
            )

    def product(self, x: Array, form: Any) -> Array:
        return by_code(x, form, self.name)


class _Pallas(Words):
    """Bits, unpacked in the kernel."""

    def check(self, form: Form) -> None:
        super().check(form)
        assert isinstance(form, Columns)
        if form.width != 1:
            raise ValueError(f"the kernel {self.name!r} wants codes of 1 bit, got {form.width} bits; leave kernel= out")


@KERNELS.register("pallas_tpu")
class PallasTPU(_Pallas):
    """Bits on TPU."""

    name = "pallas_tpu"


@KERNELS.register("pallas_gpu")
class PallasGPU(_Pallas):
    """Bits on GPU."""

    name = "pallas_gpu"


def by_code(x: Float[Array, "m k"], form: Columns, kernel: str | None = None) -> Float[Array, "m n"]:
    """sum over blocks b of first[b] sum(x[b]) + step[b] (x[b].code[b])."""

    def block(y: Array, part: tuple[Array, ...]) -> tuple[Array, None]:
        x, words, first, step = part
        total = x.sum(1, keepdims=True, dtype=jnp.float32)
        return y + first * total + step * code_product(x, words, form.width, kernel), None

    cut = x.reshape(x.shape[0], -1, form.block).swapaxes(0, 1)
    nothing = jnp.zeros((x.shape[0], form.words.shape[-1]), jnp.float32)
    return jax.lax.scan(block, nothing, (cut, form.words, *form.lines()))[0]


def code_product(
    x: Float[Array, "m k"], words: UInt32[Array, "w n"], width: int, kernel: str | None = None
) -> Float[Array, "m n"]:
    """y[m, n] = sum_k x[m, k] code[k, n] in float32; under vmap over x alone, the rows of all are one product."""
    if kernel is None and is_shared():
        kernel = _anywhere(x)
    return _PRODUCT.bind(x, words, width=width, kernel=kernel)


def _anywhere(x: Array) -> str:
    return "words" if jaxpr.at_most(x.shape[0], codes_xla.FEW) else "tiles"


def _code_product(x: Array, words: Array, *, width: int, kernel: str | None) -> Array:
    by_name: dict[str | None, Callable[..., Array]] = {
        "words": functools.partial(codes_xla.word_by_word, width=width),
        "tiles": functools.partial(codes_xla.in_tiles, width=width),
    }
    anywhere = by_name[_anywhere(x)]
    if kernel in by_name:
        return by_name[kernel](x, words)
    taken = width == 1 and x.dtype in (jnp.float32, jnp.bfloat16) and jaxpr.is_known(x.shape)
    if kernel is None and not taken:
        return anywhere(x, words)  # what the Pallas kernels do not take
    tpu, gpu = (pallas.bit_product for pallas in pallas_kernels())
    if kernel is not None:
        return (tpu if kernel == "pallas_tpu" else gpu)(x, words)
    return jax.lax.platform_dependent(x, words, tpu=tpu, cuda=gpu, default=anywhere)


_RowsAndWords = Callable[[Array, Array], Array]
"""A product of rows of numbers with words down the columns."""


def _mapped_product(operands: Sequence[Array], axes: Sequence[int | None], **how: Any) -> tuple[Array, int]:
    return jax.vmap(mapped_over_rows(functools.partial(code_product, **how)), axes)(*operands), 0


_PRODUCT = jaxpr.primitive(
    "code_product",
    _code_product,
    lambda x, words: ((x.shape[0], words.shape[1]), jnp.float32),
    (lambda tangent, _, words, width, kernel: codes_xla.in_tiles(tangent, words, width), None),
    _mapped_product,
)


def pallas_kernels() -> tuple[ModuleType, ModuleType]:
    """The kernels for TPU and GPU."""
    from lcq.kernels import pallas_gpu, pallas_tpu  # here, as they take a sixth of the time of `import lcq`

    return pallas_tpu, pallas_gpu


def mapped_over_rows(product: _RowsAndWords) -> _RowsAndWords:
    """A product of rows and words; mapped over rows alone it has more rows."""
    mapped = jax.custom_batching.custom_vmap(product)

    @mapped.def_vmap
    def _(size: int, batched: Sequence[bool], rows: Array, words: Array) -> tuple[Array, bool]:
        if batched[1]:
            rows = rows if batched[0] else jnp.broadcast_to(rows, (size, *rows.shape))
            return jax.lax.map(lambda one: mapped(*one), (rows, words)), True
        y = mapped(rows.reshape(-1, rows.shape[-1]), words)
        return y.reshape(size, -1, y.shape[-1]), True

    return mapped
