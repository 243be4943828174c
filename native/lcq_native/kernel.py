"""`Native`: which forms the compiled products serve, and how their arrays are handed over."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lcq.forms import Columns, Form
from lcq.kernels import KERNELS, CompiledKernel, Kernel
from lcq_native.library import instruction_set

LEVELS = 16
"""Levels of a codebook, at most: so many one shuffle looks up. To look up more one by one is no faster than in XLA."""


@KERNELS.register("native")
class Native(CompiledKernel):
    """Codes, compiled for CPUs."""

    def check(self, form: Form) -> None:
        super().check(form)
        assert isinstance(form, Columns)
        if not _served(form):
            raise ValueError(
                f"the kernel 'native' wants levels with equal steps or at most {LEVELS} of them, got a codebook of "
                f"{form.levels.shape[-2]}; leave kernel= out"
            )

    def compute(self, x: Float[Array, "m k"], form: Columns, instructions: str = "") -> Float[Array, "m n"]:
        """By the best instruction set that there is, or a named one."""
        result = jax.ShapeDtypeStruct((x.shape[0], form.columns), jnp.float32)
        x, static = x.astype(jnp.float32), {"width": form.width, "set": instructions}
        if form.levels is not None:
            return jax.ffi.ffi_call("lcq_book", result)(x, form.words, form.levels.astype(jnp.float32), **static)
        none = jnp.zeros((0,), jnp.float32)
        step = form.step if form.step.dtype in (jnp.float16, jnp.bfloat16) else form.step.astype(jnp.float32)
        first = none if form.lowest is not None else form.first.astype(jnp.float32)
        if form.zero is None:
            zero = none
        else:
            zero = form.zero if form.zero.dtype == jnp.uint8 else form.zero.astype(jnp.float32)
        lowest = np.float32(0 if form.lowest is None else form.lowest)
        return jax.ffi.ffi_call("lcq_even", result)(x, form.words, step, first, zero, lowest=lowest, **static)


FEW = 2
"""Rows up to which XLA reads equal steps of more than a bit as fast."""


@KERNELS.register("native_codes")
class NativeCodes(Kernel):
    """The faster of `native` and `codes`, on CPUs with AVX2 or AVX-512."""

    def suits(self, form: Form) -> bool:
        return isinstance(form, Columns) and _served(form) and instruction_set() != "plain"

    def check(self, form: Form) -> None:
        KERNELS["native"]().check(form)

    def way(self, form: Form, rows: int) -> str:
        return _faster(form, rows).way(form, rows)

    def product(self, x: Float[Array, "m k"], form: Form) -> Float[Array, "m n"]:
        return _faster(form, x.shape[0]).product(x, form)


def _faster(form: Columns, rows: int) -> Kernel:
    one_by_one = jax.export.is_symbolic_dim(rows) or (rows <= FEW and form.levels is None and form.width > 1)
    return KERNELS["codes" if one_by_one else "native"]()


def _served(form: Columns) -> bool:
    return form.levels is None or (form.levels.shape[-2] <= LEVELS and form.width in (2, 4))
