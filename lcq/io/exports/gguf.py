"""GGUF: what llama.cpp and its kin read. A file of metadata and tensors [outputs, inputs], weights in blocks.

    value = d (code + lowest) + m         one d, and of some types one m, in float16, for 32 or 256 inputs

Codes are those of the form; the package's own quantizer is not asked. Without zeros TQ2_0 takes levels from -1 to 2
where a scale is for 256 inputs or more, Q4_0 from -8 to 7, Q5_0 from -16 to 15, Q8_0 from -128 to 127; with zeros Q4_1
and Q5_1 take codes below 16 and 32, m = -d z, and Q4_K and Q5_K such codes whose d and m are multiples of 6 bits of
units that all inputs of an output share, 256 of them or twice, thrice .. as many. Levels of 6 bits in groups of 16 that
32 does not divide are Q6_K's. If a name says so, TQ1_0 takes levels from -1 to 1, MXFP4 those of e2m1 with scales that
are powers of two, and Q4_K, Q5_K and Q6_K scales of any kind, which become multiples of units that 256 inputs share:
those of a file that was read are its own again. All else is F32, F16, BF16 or whole numbers; vectors are F32.

Source: the layouts are in `lcq.io.layouts.gguf_blocks` and `gguf_superblocks`; gguf-py/gguf/constants.py has names and
keys.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Shaped

from lcq.forms import Codes
from lcq.forms.axes import letters
from lcq.forms.steps import steps_of
from lcq.io.atomic import replacing
from lcq.io.container import Json, flat
from lcq.io.exports.base import EXPORT_FORMATS, Encoded, ExportFormat, Tensor
from lcq.io.exports.gguf_metadata import metadata_of
from lcq.io.exports.gguf_tokenizer import padded_to, tokenizer_fields
from lcq.io.exports.grids import Kind, grid_of, kind_of, plain_tensor, plain_tensor_shape
from lcq.io.exports.leaves import NO_TARGET, Item
from lcq.io.exports.steps import blocks_of, cast, in_units, moved, rounded, turned
from lcq.io.facts import Facts
from lcq.io.layouts import (
    BLOCK_TYPES,
    SUPERBLOCK_TYPES,
    TENSOR_DTYPES,
    TENSOR_TYPES,
    Blocks,
    BlockType,
    SuperBlockType,
    gguf_header,
)

_AXES, _LONGEST_NAME = 4, 63
_FLOATS = ("F32", "F16", "BF16")
_ROUNDING = 1e-6
"""A movement that is of float32 alone: zeros are kept as quotients."""
_PLAIN, _SHIFTED = ("TQ2_0", "Q4_0", "Q5_0", "Q8_0"), ("Q4_1", "Q5_1")
_STEPPED, _STEP_BITS = ("Q4_K", "Q5_K"), 6
_SIGNED, _SIGNED_STEPS = "Q6_K", (-128, *(sign * n for n in range(127, 111, -1) for sign in (1, -1)))


@EXPORT_FORMATS.register("gguf")
class Gguf(ExportFormat):
    """A .gguf file. `config` is its metadata by key, or the config.json of a llama beside keys with dots."""

    suffix = ".gguf"

    @classmethod
    def facts(cls) -> Facts:
        return Facts(
            "`.gguf` for llama.cpp and its kin",
            f"{', '.join(TENSOR_DTYPES)}; vectors become F32",
            f"{', '.join((*_PLAIN, *_SHIFTED, *_STEPPED, _SIGNED))}; by name TQ1_0, MXFP4; scales become float16",
            f"groups that blocks of 16, 32 or 256 inputs do not divide, other levels; uint8, bool; {NO_TARGET}",
        )

    def __init__(self, config: Mapping[str, Json]) -> None:
        super().__init__(config)
        self._metadata = metadata_of(config)
        self._words: dict[str, Json] = {}

    def take_tokenizer(self, path: Path) -> None:
        pre = self._metadata.get("tokenizer.ggml.pre")
        self._words = tokenizer_fields(path, pre if isinstance(pre, str) else None)

    def declare(self, item: Item) -> dict[str, Tensor]:
        if len(item.name.encode()) > _LONGEST_NAME:
            raise ValueError(
                f"expected a name of at most {_LONGEST_NAME} bytes, as llama.cpp reads them, got {item.name!r}; say "
                f"lcq.io.Name({item.path!r}, 'NAME')"
            )
        if isinstance(item.value, Codes):
            kind, block = block_of(item)
            blocks = kind.outputs * (kind.inputs // block.length)
            experts = item.value.shape[: item.rule.experts]
            shape = (*experts, kind.outputs // math.prod(experts), kind.inputs)
            name, size = block.name, blocks * block.size
        else:
            name, shape = _type_of(item), plain_tensor_shape(item.value.shape, item.rule)
            size = math.prod(shape) * TENSOR_DTYPES[name].itemsize
        if len(shape) > _AXES:
            raise ValueError(f"expected at most {_AXES} axes, got {list(shape)}; leave this leaf out: name=None")
        return {item.name: Tensor(shape, name, size)}

    def encode(self, item: Item) -> Encoded:
        if isinstance(item.value, Codes):
            return _encode_blocks(item)
        array, rule, name = item.value, item.rule, _type_of(item)
        assert isinstance(array, np.ndarray)
        made, error = cast(plain_tensor(array, rule), TENSOR_DTYPES[name])
        return Encoded({item.name: made}, name, error, f"{array.dtype} to {name}" if error else "")

    def write(
        self, path: Path, tensors: dict[str, Tensor], arrays: Iterator[tuple[str, Shaped[np.ndarray, "..."]]]
    ) -> tuple[str, ...]:
        blocks: dict[str, BlockType | SuperBlockType] = {**BLOCK_TYPES, **SUPERBLOCK_TYPES}
        numbers = TENSOR_TYPES | {name: block.number for name, block in blocks.items()}
        if self._words and "token_embd.weight" in tensors:
            self._words = padded_to(self._words, tensors["token_embd.weight"].shape[0])
        metadata = self._metadata | self._words
        head = gguf_header(metadata, {n: (t.shape, numbers[t.kind], t.size) for n, t in tensors.items()})
        with replacing(path) as file:
            file.write(head)
            for _, array in arrays:
                file.write(flat(np.ascontiguousarray(array)).data)
                file.write(bytes(-array.nbytes % 32))
        notes = []
        strange = [name for name in tensors if "token_embd.weight" not in tensors or name.startswith("model.")]
        if metadata["general.architecture"] == "llama" and strange:
            notes.append(
                f"note: llama.cpp does not know these names of a llama, {strange[0]} and {len(strange) - 1} more; give "
                "names=lcq.io.llama_names(..)"
            )
        if "tokenizer.ggml.tokens" not in metadata:
            notes.append(
                "note: without a tokenizer llama.cpp does not load a file; give the tokenizer.json as tokenizer="
            )
        return tuple(notes)


def _layout(item: Item) -> str | None:
    return item.rule.layout_of(len(item.value.shape))


def _type_of(item: Item) -> str:
    """The type of an array that is no codes.

    Raises:
        ValueError: a dtype, or a type that the name says, that a file cannot hold.
    """
    dtype = np.dtype(item.value.dtype)
    known = next((name for name, each in TENSOR_DTYPES.items() if each == dtype), None)
    if known is None:
        have = ", ".join(map(str, TENSOR_DTYPES.values()))
        raise ValueError(f"expected one of {have}, got {dtype}; make it another, or leave it out: name=None")
    if item.rule.type is not None:
        if item.rule.type not in _FLOATS or known not in _FLOATS:
            raise ValueError(f"expected type= one of {', '.join(_FLOATS)} for an array, got {item.rule.type!r}")
        return item.rule.type
    return "F32" if known in _FLOATS and len(item.value.shape) < 2 else known


def block_of(item: Item) -> tuple[Kind, BlockType | SuperBlockType]:
    """The kind of a grid, turned round if that fits, and the type of blocks that holds it in the fewest bytes.

    Raises:
        ValueError: none does; says why.
    """
    assert isinstance(item.value, Codes)
    kind = kind_of(item.value, _layout(item))
    if item.rule.type in (None, *_STEPPED) and (stepped := _stepped(item.value, _layout(item), kind)):
        if wanted := [block for block in stepped if item.rule.type in (None, block.name)]:
            return kind, wanted[0]
    if item.rule.type in (*_STEPPED, _SIGNED) or (item.rule.type is None and _only_six_bits_hold(kind)):
        return _in_units(kind, item.rule.type or _SIGNED, item.value)
    known: tuple[str, ...] = _SHIFTED if kind.steps.shifted else _PLAIN
    if item.rule.type is not None:
        if item.rule.type not in BLOCK_TYPES:
            types = ", ".join((*BLOCK_TYPES, *_STEPPED, _SIGNED))
            raise ValueError(f"expected type= one of {types}, got {item.rule.type!r}")
        known = (item.rule.type,)
    why = []
    for block in (BLOCK_TYPES[name] for name in known):
        ways = [kind.steps] if kind.steps.shifted else [kind.steps, turned(kind.steps)]
        fitting = [each for each in ways if block.minimum == kind.steps.shifted and _holds(block, each.levels)]
        if not fitting:
            why.append(f"{block.name} has no such levels")
        elif kind.group % block.length:
            why.append(f"{block.name} has a scale for {block.length} inputs, these one for {kind.group}")
        else:
            return kind._replace(steps=fitting[0]), block
    levels = f"{min(kind.steps.levels)} .. {max(kind.steps.levels)}" + (" with zeros" if kind.steps.shifted else "")
    raise ValueError(
        f"expected codes that a block holds, got levels {levels} {kind.words}: {'; '.join(why)}; compress with "
        "lcq.Uniform(4, per=32) or lcq.Ternary(per=256), or leave this leaf as it is"
    )


def _stepped(form: Codes, layout: str | None, kind: Kind) -> list[SuperBlockType]:
    """The types of blocks that hold scales in steps as they are."""
    axes = letters(str(layout), len(form.shape))
    inputs = [i - len(axes) for i, axis in enumerate(axes) if axis == "i" and blocks_of(form)[i] > 1]
    if form.scale_bits != _STEP_BITS or not set(inputs) <= set(form.along or ()):
        return []
    types = (SUPERBLOCK_TYPES[name] for name in _STEPPED)
    return [
        block
        for block in types
        if kind.group * block.groups == block.length
        and kind.inputs % block.length == 0
        and set(kind.steps.levels) <= set(block.levels)
    ]


def _in_units(kind: Kind, name: str, form: Codes) -> tuple[Kind, SuperBlockType]:
    """A kind, turned round if that fits, and a type of blocks in which scales become multiples of units.

    Raises:
        ValueError: others; says which.
    """
    block, shifted = SUPERBLOCK_TYPES[name], name != _SIGNED
    ways = [kind.steps] if kind.steps.shifted else [kind.steps, turned(kind.steps)]
    fitting = [each for each in ways if each.shifted == shifted and set(each.levels) <= set(block.levels)]
    run = block.length // block.groups
    if not fitting or kind.group % run or kind.inputs % block.length:
        raise ValueError(
            f"expected for {name} levels {block.levels[0]:.0f} .. {block.levels[-1]:.0f}{' with zeros' * shifted} in "
            f"groups of {run} of a multiple of {block.length} inputs, got {form.describe()} of {kind.inputs} inputs "
            f"{kind.words}; compress with "
            + ("lcq.Uniform(4, per=32, zero_point=True, scale_bits=6)" if shifted else "lcq.Uniform(6, per=16)")
        )
    return kind._replace(steps=fitting[0]), block


def _only_six_bits_hold(kind: Kind) -> bool:
    """Whether levels need 6 bits, and groups are short, as those of Q6_K are."""
    levels, block = kind.steps.levels, SUPERBLOCK_TYPES[_SIGNED]
    many, run = max(levels) - min(levels) + 1, block.length // block.groups
    fits = not (kind.steps.shifted or kind.group % run or kind.inputs % block.length)
    return fits and kind.group % (2 * run) > 0 and len(block.levels) // 2 < many <= len(block.levels)


def _holds(block: BlockType, levels: tuple[int, ...]) -> bool:
    """Whether all levels are among those of a type; of MXFP4 in halves."""
    return {level * _unit(block) for level in levels} <= set(block.levels)


def _unit(block: BlockType) -> float:
    return 0.5 if block.name == "MXFP4" else 1.0


def _encode_blocks(item: Item) -> Encoded:
    assert isinstance(item.value, Codes)
    kind, block = block_of(item)
    if isinstance(block, SuperBlockType):
        stepped = block in _stepped(item.value, _layout(item), kind)
        return _encode_steps(item, kind, block) if stepped else _encode_units(item, kind, block)
    unit, rows = _unit(block), kind.outputs
    places = {level: code for code, level in enumerate(block.levels)}
    table = np.asarray([places[level * unit] for level in kind.steps.levels], np.uint8)
    grid = grid_of(item.value, _layout(item), kind, table, item.rule.heads)
    codes = grid.codes.reshape(rows, -1, block.length)
    scale = np.repeat(grid.scale.astype(np.float64) / unit, kind.group // block.length, axis=1)
    if block.name == "MXFP4":  # a scale has no sign there, codes do
        codes = np.where(scale[..., None] < 0, np.uint8(14) - codes, codes)
        return Encoded({item.name: block.pack(Blocks(codes, np.abs(scale).astype(np.float32)))}, f"MXFP4 {kind.words}")
    least = None
    if grid.zero is not None:
        least = -np.repeat(grid.zero.astype(np.float64), kind.group // block.length, axis=1) * scale
    made = Blocks(codes, rounded(scale, "float16"), None if least is None else cast(least, np.dtype(np.float16))[0])
    error = moved(codes, np.asarray(block.levels), (made.scale, made.minimum), (scale, least))
    words = "scales" if least is None else "scales and minima"
    return Encoded(
        {item.name: block.pack(made)}, f"{block.name} {kind.words}", error, f"{words} to float16" if error else ""
    )


def _encode_steps(item: Item, kind: Kind, block: SuperBlockType) -> Encoded:
    assert isinstance(item.value, Codes)
    same = np.arange(len(kind.steps.levels), dtype=np.uint8)
    grid = grid_of(item.value, _layout(item), kind, same, item.rule.heads)
    assert grid.zero is not None
    scale, least, given = map(np.asarray, steps_of(grid.scale, grid.zero, _STEP_BITS, (-1,)))
    units, _ = cast(given, np.dtype(np.float16))
    codes, many = grid.codes.astype(np.uint8), (kind.outputs, kind.inputs // block.length)
    data = block.pack(
        codes.reshape(*many, block.groups, -1),
        scale.reshape(*many, -1),
        least.reshape(*many, -1),
        np.broadcast_to(units, (2, *many)),
    )
    made, before = ((a.astype(np.float64) * scale, -b.astype(np.float64) * least) for a, b in (units, given))
    error = moved(codes.reshape(*scale.shape, -1), np.asarray(block.levels), made, before)
    return Encoded({item.name: data}, f"{block.name} {kind.words}", error, "units to float16" if error else "")


def _encode_units(item: Item, kind: Kind, block: SuperBlockType) -> Encoded:
    """Scales, and least values, as multiples of units that a block shares: those of blocks that they came from."""
    assert isinstance(item.value, Codes)
    table = np.asarray(kind.steps.levels) - int(block.levels[0])
    grid = grid_of(item.value, _layout(item), kind, table.astype(np.uint8), item.rule.heads)
    run, many = block.length // block.groups, (kind.outputs, kind.inputs // block.length)
    codes = grid.codes.astype(np.uint8).reshape(*many, block.groups, run)
    scale = np.repeat(grid.scale.astype(np.float64), kind.group // run, axis=1).reshape(*many, -1)
    if grid.zero is None:
        least, shift = None, None
        whole, units = in_units(scale, _SIGNED_STEPS)
        data = block.pack(codes, whole, None, units[None, ..., 0])
        after = None
    else:
        zero = np.repeat(grid.zero.astype(np.float64), kind.group // run, axis=1).reshape(*many, -1)
        codes, scale, least = _upright(codes, scale, zero, len(block.levels) - 1)
        whole, units = in_units(scale, range((1 << _STEP_BITS) - 1, 0, -1))
        lows, least_units = in_units(least, range((1 << _STEP_BITS) - 1, 0, -1))
        data = block.pack(codes, whole, lows, np.stack([units[..., 0], least_units[..., 0]]))
        shift, after = -least, -least_units.astype(np.float64) * lows
    rows = (kind.outputs, -1)
    made, before = (
        (a.reshape(rows), None if b is None else b.reshape(rows))
        for a, b in ((units.astype(np.float64) * whole, after), (scale, shift))
    )
    error = moved(codes.reshape(*rows, run), np.asarray(block.levels), made, before)
    error = error if error > _ROUNDING else 0.0
    why = "scales to multiples of units in float16" if error else ""
    return Encoded({item.name: data}, f"{block.name} {kind.words}", error, why)


def _upright(
    codes: np.ndarray, scale: np.ndarray, zero: np.ndarray, top: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scales and least values a z of groups, none below 0: where a scale is, codes are turned round.

    A group that is a constant below 0, as one with a scale of 0 is read, gets a scale of 0 again.

    Raises:
        ValueError: groups whose least weight is above 0.
    """
    down = scale < 0
    flat = down & (codes.max(-1) == codes.min(-1)) & (zero < 0)
    constant = scale * (codes[..., 0] - zero)
    codes = np.where((down & ~flat)[..., None], top - codes, codes).astype(np.uint8)
    least = np.where(down, -scale * (top - zero), scale * zero)
    least, scale = np.where(flat, -constant, least), np.where(flat, 0, np.abs(scale))
    if (least < 0).any():
        raise ValueError(
            "expected groups whose least weight is at most 0, got one above; compress with zeros from 0 to the highest "
            "code, as lcq.Uniform(4, per=32, zero_point=True) has them, or leave out type="
        )
    return codes, scale, least
