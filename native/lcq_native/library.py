"""The compiled library, and what XLA may call of it."""

import ctypes
import functools
from pathlib import Path

import jax

_LIBRARY = ctypes.cdll.LoadLibrary(str(next(Path(__file__).parent.glob("lcq_native.*"))))
_LIBRARY.lcq_best.restype = ctypes.c_char_p

for _name in ("lcq_book", "lcq_even"):
    jax.ffi.register_ffi_target(_name, jax.ffi.pycapsule(getattr(_LIBRARY, _name)), platform="cpu")


@functools.cache
def instruction_set() -> str:
    """The best that this processor has of "plain", "avx2" and "avx512"."""
    return _LIBRARY.lcq_best().decode()
