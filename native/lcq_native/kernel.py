"""`Native`: which forms the compiled products serve, and how their arrays are handed over."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from lcq.forms import Columns, Form
from lcq.kernels import KERNELS, CompiledKernel

from lcq_native.library import instruction_set

LEVELS = 16
"""Levels, at most, of a codebook that is looked up by shuffles."""


@KERNELS.register("native")
class Native(CompiledKernel):
    """Codes on CPUs with AVX2 or AVX-512."""

    def suits(self, form: Form) -> bool:
        return isinstance(form, Columns) and instruction_set() != "plain" and _served(form)

    def check(self, form: Form) -> None:
        super().check(form)
        assert isinstance(form, Columns)
        if not _served(form):
            raise ValueError(f"the kernel 'native' wants codebooks of at most {LEVELS} levels; leave kernel= out")

    def compute(self, x: Float[Array, "m k"], form: Columns, instructions: str = "") -> Float[Array, "m n"]:
        """By an instruction set; the best that there is without one."""
        result = jax.ShapeDtypeStruct((x.shape[0], form.columns), jnp.float32)
        levels = form.levels.astype(jnp.float32)
        return jax.ffi.ffi_call("lcq_book", result)(
            x.astype(jnp.float32), form.words, levels, width=form.width, set=instructions
        )


def _served(form: Columns) -> bool:
    return form.levels is not None and form.levels.shape[-2] <= LEVELS
