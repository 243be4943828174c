"""Arrays as qwix quantizes them, {qvalue, scale, zero_point}, and the forms of the same codes.

    Delta = (qvalue - zero_point) scale,  a scale for each group along the axes that it is cut into

qwix keeps them in a tree of parameters as objects, `kernel.array.qvalue`; a checkpoint of orbax has dicts instead. Its
nf4, levels that are no grid, has codes of uint4, too; that they are none is in `qtype` alone.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from lcq.forms import Codes
from lcq.forms.validate import named

_BITS = {"int2": 2, "uint2": 2, "int4": 4, "uint4": 4, "int8": 8, "uint8": 8}


def from_qwix(tree: PyTree) -> Any:
    """A tree with a form for every array that qwix quantized, stored; everything else as it is.

    Args:
        tree: parameters as nested dicts, a quantized array being an object or a dict with `qvalue`, `scale` and perhaps
            `zero_point` and `qtype`, or one that has such an `array`.

    Raises:
        ValueError: codes of a dtype that is not int2, int4, int8 or unsigned, uint4 without a `qtype` of that name, or
            scales that do not divide them; names the leaf.

    Example:
        >>> array = {"qvalue": np.array([[1, -2]], "i1"), "scale": np.ones((1, 1), np.float32)}
        >>> from_qwix({"kernel": {"array": array}})["kernel"].dense().tolist()
        [[1.0, -2.0]]
    """
    return _walk(tree, "")


def _walk(node: Any, path: str) -> Any:
    if (found := _quantized(node)) is not None:
        with named(path[1:] or "the tree"):
            return _form(*found).pack()
    if isinstance(node, Mapping):
        return {key: _walk(value, f"{path}/{key}") for key, value in node.items()}
    if isinstance(node, list | tuple) and not hasattr(node, "_fields"):
        return type(node)(_walk(value, f"{path}/{i}") for i, value in enumerate(node))
    return node


def _quantized(node: Any) -> tuple[Any, Any, Any, Any] | None:
    """Codes, scales, zeros and the type of a node that is a quantized array, or holds one and nothing else."""

    def of(holder: Any, name: str) -> Any:
        return holder.get(name) if isinstance(holder, Mapping) else getattr(holder, name, None)

    inner = of(node, "array")
    if inner is not None and (not isinstance(node, Mapping) or len(node) == 1):
        node = inner
    codes, scale = of(node, "qvalue"), of(node, "scale")
    return None if codes is None or scale is None else (codes, scale, of(node, "zero_point"), of(node, "qtype"))


def _form(codes: Any, scale: Any, zero: Any, kind: Any) -> Codes:
    codes, scale = (np.asarray(getattr(a, "value", a)) for a in (codes, scale))
    if (bits := _BITS.get(codes.dtype.name)) is None:
        raise ValueError(f"expected codes of {', '.join(_BITS)}, got {codes.dtype}; make it dense with qwix.dequantize")
    if codes.dtype.name == "uint4" and (isinstance(kind, str) or kind is None) and kind != "uint4":
        raise ValueError(
            f"expected the qtype 'uint4' of codes of uint4, got {kind!r}, and nf4 is kept so too; make it dense with "
            "qwix.dequantize, or say qtype beside qvalue"
        )
    if scale.ndim != codes.ndim or any(c < 1 or n % c for c, n in zip(scale.shape, codes.shape, strict=True)):
        raise ValueError(f"expected scales that divide {list(codes.shape)}, got {list(scale.shape)}")
    low = 0 if codes.dtype.name.startswith("u") else -(1 << (bits - 1))
    whole = (codes.astype(np.int16) - low).astype(np.uint8)
    dtype = str(scale.dtype)
    if zero is None or not np.asarray(getattr(zero, "value", zero)).any():
        values = tuple(float(low + i) for i in range(1 << bits))
        return Codes(whole, scale=scale, values=values, dtype=dtype)
    shift = np.broadcast_to(np.asarray(getattr(zero, "value", zero)), scale.shape).astype(np.int16) - low
    values = tuple(map(float, range(1 << bits)))
    return Codes(whole, scale=scale, zero=jnp.asarray(shift.astype(np.uint8)), values=values, dtype=dtype)
