"""Safetensors whose weights are codes: compressed-tensors (vLLM, llm-compressor), GPTQ and fp8, as a config.json says.

Of a module X the file has

    compressed-tensors  X.weight_packed int32 [out, ceil(in b / 32)] and X.weight_shape, or X.weight int8 or float8;
                        X.weight_scale [out, in/g]   X.weight_zero_point   X.weight_g_idx
    gptq                X.qweight int32 [in b / 32, out]   X.qzeros [in/g, out b / 32]   X.scales [in/g, out]   X.g_idx
    fp8                 X.weight float8 [out, in]   X.weight_scale_inv, a scale for each block of 128 by 128, or
                        X.weight_scale, one for all

What is read is X.weight (out, in): a form of the same codes, scales and zeros, with the dtype of the scales; or that
form made dense. Every other tensor is as it is. The config is looked for beside the file; without one all tensors are
as they are, and of other methods too, unless forms are asked for. A warning names weights of a byte whose scales then
lie beside them.
"""

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lcq.forms import Codes
from lcq.forms.bitpack import word_count
from lcq.forms.dtypes import FORMATS
from lcq.forms.validate import named
from lcq.io.container import Json, read_object
from lcq.io.facts import Facts
from lcq.io.layouts import unpack_rows

Arrays = dict[str, Any]
"""Tensors by name; forms in place of some."""

Parts = dict[str, np.ndarray]
"""Tensors of a module by the ends of their names."""


def quantization_of(path: Path, names: Iterable[str]) -> Json:
    """How the weights of a safetensors file, index or folder were quantized; None if no file beside it says so.

    Args:
        path: of the checkpoint.
        names: of its tensors; unless one is named as codes or scales are, no file is looked at.

    Raises:
        ValueError: a config that is no object of JSON.
    """
    signs = {sign for method in _METHODS.values() for sign in method.signs}
    if not any(name.endswith(sign) for name in names for sign in signs):
        return None
    folder = path if path.is_dir() else path.parent
    for name, inside in (("config.json", True), ("quantize_config.json", False)):
        if not (folder / name).is_file():
            continue
        said = read_object(folder / name)
        if not inside:
            return {"quant_method": "gptq"} | said
        inner = said.get("text_config")
        for holder in (said, inner if isinstance(inner, dict) else {}):
            for key in ("quantization_config", "compression_config"):
                if isinstance(holder.get(key), dict):
                    return holder[key]
    return None


def with_forms(path: Path, arrays: Arrays, config: Json, *, dense: bool) -> Arrays:
    """Tensors with X.weight in place of what a module's codes are made of.

    Args:
        path: of the checkpoint, for errors.
        arrays: by name.
        config: of `quantization_of`.
        dense: whether forms are made dense, in numpy.

    Raises:
        ValueError: a module whose tensors do not fit together, or whose columns are in groups that are not runs and are
            to stay codes; names it.
    """
    method, kind = config.get("quant_method"), config.get("format")
    if (
        not isinstance(method, str)
        or method not in _METHODS
        or (method == "compressed-tensors" and not _is_known(config))
    ):
        if dense:
            return arrays
        raise ValueError(
            f"{path}: expected weights quantized by {', '.join(_METHODS)}, {', '.join(_KINDS)}, got {method!r:.80}, "
            f"{kind!r:.80}; read its tensors as they are, without forms"
        )
    signs, ends, make = _METHODS[method]
    modules = {name.removesuffix(sign) for name in arrays for sign in signs if name.endswith(sign)}
    result: Arrays = {}
    for name, array in arrays.items():
        module = next((name.removesuffix(end) for end in ends if name.endswith(end)), name)
        if module not in modules:
            result[name] = array
        elif f"{module}weight" not in result:
            with named(f"{path}: {module.removesuffix('.')[:200]}"):
                parts = {end: arrays[module + end] for end in ends if module + end in arrays}
                form, order = make(parts, config | {"module": module.removesuffix(".")})
                if order is not None and not dense:
                    raise ValueError(
                        "expected groups of neighbouring columns, got g_idx in another order (actorder, desc_act), "
                        "which forms cannot say; read it dense"
                    )
                result[f"{module}weight"] = _dense(form, order) if dense else form.pack()
    return result


def warn_of_scales(path: Path, arrays: Mapping[str, Any]) -> None:
    """Says so where weights of a byte are left without the scales that lie beside them."""
    short = [name for name, array in arrays.items() if array.dtype.itemsize == 1]
    left = [name for name in short if any(name + end in arrays for end in ("_scale", "_scale_inv"))]
    if left:
        warnings.warn(
            f"{path}: {left[0][:200]} and {len(left) - 1} others are read without the scales beside them: expected a "
            f"config.json that says {' or '.join(_METHODS)}, got none or another; multiply them yourself",
            stacklevel=6,
        )


def _dense(form: Codes, order: np.ndarray | None) -> np.ndarray:
    if order is not None:
        spread = {name: a[:, order] for name in ("scale", "zero") if (a := getattr(form, name)) is not None}
        form = dataclasses.replace(form, **spread)
    return np.asarray(jax.tree.map(jnp.asarray, form).dense())


def _compressed(parts: Parts, config: Json) -> tuple[Codes, np.ndarray | None]:
    words, scale, zero = (parts.get("weight_packed"), _needed(parts, "weight_scale"), parts.get("weight_zero_point"))
    if words is None:
        return _bytes(_needed(parts, "weight"), scale, zero, _block_lengths(config)), None
    shape = parts.get("weight_shape")
    if shape is None or shape.shape != (2,):
        raise ValueError("weight_shape: expected two lengths; get the whole checkpoint")
    out, width = map(int, shape)
    if words.dtype != np.int32 or words.ndim != 2 or words.shape[0] != out or width < 1:
        raise ValueError(f"weight_packed: expected int32 [{out}, words], got {words.dtype}{list(words.shape)}")
    bits = _checked_bits(_bits_of_words(config, width, words.shape[1]))
    codes = unpack_rows(words, bits, width)
    scale = _scales(scale if scale.ndim == 2 else scale.reshape(-1, 1), out, width)
    if zero is not None and zero.dtype == np.int32:
        zero = unpack_rows(np.ascontiguousarray(zero.T), bits, out).T
        if zero.shape != scale.shape:
            raise ValueError(f"weight_zero_point: expected {list(scale.shape)}, got {list(zero.shape)}")
    elif zero is not None:
        raise ValueError(f"weight_zero_point: expected int32, packed, got {zero.dtype}")
    order = parts.get("weight_g_idx")
    order = None if order is None or (order < 0).any() else order
    return _form(codes, scale, zero, bits), _order(order, width, scale.shape[1])


def _gptq(parts: Parts, config: Json) -> tuple[Codes, np.ndarray | None]:
    words, scale, zeros = (_needed(parts, name) for name in ("qweight", "scales", "qzeros"))
    bits = _checked_bits(config["bits"] if type(config.get("bits")) is int else 0)
    if words.dtype != np.int32 or words.ndim != 2 or scale.ndim != 2 or scale.shape[1] != words.shape[1]:
        raise ValueError(f"qweight: expected int32 [words, {scale.shape[-1]}], got {words.dtype}{list(words.shape)}")
    width, out = words.shape[0] * 32 // bits, words.shape[1]
    codes = unpack_rows(np.ascontiguousarray(words.T), bits, width)
    stored = unpack_rows(np.ascontiguousarray(zeros), bits, out)
    if stored.shape != scale.shape:
        raise ValueError(f"qzeros: expected {list(scale.shape)} zeros, got {list(stored.shape)}")
    first = config.get("checkpoint_format", "gptq") != "gptq_v2"
    zero = ((stored.T.astype(np.int32) + first) & ((1 << bits) - 1)).astype(codes.dtype)
    form = _form(codes, _scales(scale.T, out, width), zero, bits)
    return form, _order(parts.get("g_idx"), width, scale.shape[0])


def _fp8(parts: Parts, config: Json) -> tuple[Codes, np.ndarray | None]:
    scale = parts.get("weight_scale")
    scale = _needed(parts, "weight_scale_inv") if scale is None else scale
    return _bytes(_needed(parts, "weight"), scale, None, config.get("weight_block_size")), None


def _bytes(weight: np.ndarray, scale: np.ndarray, zero: np.ndarray | None, lengths: Json) -> Codes:
    """Of weights that are int8 or float8, with a scale for all, for each output, group or block."""
    if weight.ndim != 2 or weight.dtype.itemsize != 1 or scale.ndim > 2:
        raise ValueError(f"weight: expected a matrix of int8 or float8, got {weight.dtype}{list(weight.shape)}")
    whole = np.reshape(scale, (*scale.shape, *(1,) * (2 - scale.ndim)))
    whole = _scales(_spread(whole, weight.shape, lengths), *weight.shape)
    if weight.dtype == np.int8:
        zero = None if zero is None else (zero.astype(np.int16) + 128).astype(np.uint8).reshape(scale.shape)
        return _form(weight.view(np.uint8) ^ np.uint8(128), whole, zero, 8)
    table = np.arange(256, dtype=np.uint8).view(weight.dtype).astype(np.float32)
    levels = np.unique(table[np.isfinite(table)])
    if not np.isfinite(table[np.unique(weight.view(np.uint8))]).all():
        raise ValueError("weight: expected finite numbers, got others")
    codes = np.searchsorted(levels, np.where(np.isfinite(table), table, 0)).astype(np.uint8)[weight.view(np.uint8)]
    return Codes(codes, scale=whole, values=tuple(levels.tolist()), dtype=str(scale.dtype))


def _spread(scale: np.ndarray, shape: tuple[int, ...], lengths: Json) -> np.ndarray:
    """A scale for each row or column along an axis that blocks of these lengths do not divide."""
    given = lengths if isinstance(lengths, list) and len(lengths) == 2 else [None, None]
    for axis, (length, n) in enumerate(zip(given, shape, strict=True)):
        count = scale.shape[axis]
        if type(length) is int and length > 0 and n % length and count == -(-n // length):
            scale = np.repeat(scale, length, axis)[(slice(None),) * axis + (slice(n),)]
    return scale


def _form(codes: np.ndarray, scale: np.ndarray, zero: np.ndarray | None, bits: int) -> Codes:
    """Of symmetric codes without a zero, which is then that of the grid."""
    half = 1 << (bits - 1)
    if zero is None or (zero == half).all():
        return Codes(codes, scale=scale, values=tuple(map(float, range(-half, half))), dtype=str(scale.dtype))
    whole = tuple(map(float, range(2 * half)))
    return Codes(codes, scale=scale, zero=np.ascontiguousarray(zero), values=whole, dtype=str(scale.dtype))


def _needed(parts: Parts, name: str) -> np.ndarray:
    array = parts.get(name)
    if array is None:
        raise ValueError(f"expected {name} beside its codes, got none; get the whole checkpoint")
    return array


def _scales(scale: np.ndarray, out: int, width: int) -> np.ndarray:
    fits = scale.ndim == 2 and all(c and n % c == 0 for c, n in zip(scale.shape, (out, width), strict=True))
    if not fits or str(scale.dtype) not in FORMATS:
        raise ValueError(
            f"expected floating-point scales [{out}, groups] with groups that divide {width}, got "
            f"{scale.dtype}{list(scale.shape)}"
        )
    return np.ascontiguousarray(scale)


def _order(order: np.ndarray | None, width: int, groups: int) -> np.ndarray | None:
    """The group of each column; None where groups are runs of columns."""
    if order is None or np.array_equal(order, np.arange(width) // (width // groups)):
        return None
    if order.shape != (width,) or order.min() < 0 or order.max() >= groups:
        raise ValueError(f"g_idx: expected {width} groups below {groups}, got {list(order.shape)} up to {order.max()}")
    return order


def _schemes(config: Json) -> list[dict[str, Json]]:
    """How compressed-tensors quantized the weights of a module: one scheme if a group names it, else those of all."""
    groups = config.get("config_groups")
    whole = [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []
    own = [g for g in whole if isinstance(g.get("targets"), list) and config["module"] in g["targets"]]
    return [group["weights"] for group in own or whole if isinstance(group.get("weights"), dict)]


def _bits_of_words(config: Json, width: int, words: int) -> int:
    """Bits of codes of which so many words hold a row: of those that the config says, or of all.

    Raises:
        ValueError: several would do, as a row is short.
    """
    said = {scheme["num_bits"] for scheme in _schemes(config) if type(scheme.get("num_bits")) is int}
    if len(said) == 1:
        return said.pop()
    fitting = [bits for bits in sorted(said or range(1, 9)) if word_count(width, bits) == words]
    if len(fitting) > 1:
        raise ValueError(
            f"expected codes of one width, got {words} words for {width}, which may be of "
            f"{' or '.join(map(str, fitting))} bits; name the module in the targets of its group in the config.json"
        )
    return fitting[0] if fitting else words * 32 // width


def _block_lengths(config: Json) -> Json:
    """Rows and columns of the blocks that share a scale, [128, 128] or "128x128"; None if there is no one answer."""
    said = [scheme.get("block_structure") for scheme in _schemes(config)]
    found = [[int(n) for n in each.split("x") if n.isdecimal()] if isinstance(each, str) else each for each in said]
    return found[0] if found and all(each == found[0] for each in found) else None


def _is_known(config: Json) -> bool:
    """Whether compressed-tensors wrote all groups in formats that are read."""
    if config.get("format") != "mixed-precision":
        return config.get("format") in _KINDS
    groups = config.get("config_groups")
    return isinstance(groups, dict) and all(isinstance(g, dict) and g.get("format") in _KINDS for g in groups.values())


def _checked_bits(bits: int) -> int:
    if not 1 <= bits <= 8:
        raise ValueError(f"expected codes of 1 to 8 bits, got {bits}; the config does not belong to this file")
    return bits


class _Method(NamedTuple):
    """How a method names a module's tensors: what all that it quantized have one of, all, and what makes a form."""

    signs: tuple[str, ...]
    ends: tuple[str, ...]
    make: Callable[[Parts, Json], tuple[Codes, np.ndarray | None]]


_METHODS = {
    "compressed-tensors": _Method(
        ("weight_scale",),
        ("weight_scale", "weight_packed", "weight_shape", "weight_zero_point", "weight_g_idx", "weight"),
        _compressed,
    ),
    "gptq": _Method(("qweight",), ("qweight", "qzeros", "scales", "g_idx"), _gptq),
    "fp8": _Method(("weight_scale_inv", "weight_scale"), ("weight_scale_inv", "weight_scale", "weight"), _fp8),
}

_KINDS = ("pack-quantized", "int-quantized", "naive-quantized", "float-quantized")
"""Formats of compressed-tensors."""

FACTS = (
    Facts(
        f"… by compressed-tensors: {', '.join(f'`{kind}`' for kind in _KINDS)}",
        "`X.weight` (out, in), in the dtype of its scales",
        "1 to 8 bits, scales, zeros",
        "columns in another order (`actorder`): dense only; other formats: raw tensors",
    ),
    Facts("… by GPTQ, v1 and v2", "likewise", "1 to 8 bits, scales, zeros", "`desc_act`: dense only"),
    Facts("… by fp8, a scale for each block, or for all", "likewise", "float8 numbers as codes, scales"),
    Facts("… by AWQ, bitsandbytes and others", "raw tensors", "", "codes"),
)
"""Of `lcq.io.checkpoints.safetensors`."""
