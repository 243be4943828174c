"""Folders as Hugging Face's libraries read them: model.safetensors, written a tensor at a time, and files of JSON."""

import abc
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Shaped

from lcq.io.atomic import replacing
from lcq.io.container import DTYPES, NAMES, Json, check_names, flat, to_json
from lcq.io.exports.base import Encoded, ExportFormat, Tensor
from lcq.io.exports.gguf_tokenizer import tokenizer_of
from lcq.io.exports.grids import plain_tensor, plain_tensor_shape
from lcq.io.exports.leaves import Item

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "tokenizer.model", "chat_template.jinja", "generation_config.json"),
)
"""What a tokenizer of Hugging Face's libraries is made of, and how its model generates."""


_TABLE = re.compile(r"(.*\.)?(embed\w*|\w*embeddings?|wte|wpe)")


_JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers of which vLLM makes one."""


class SafetensorsFolder(ExportFormat):
    """model.safetensors, and what `files` says.

    A subclass says in `self.layers` how each linear layer is stored: bits, whether with zeros, inputs of a group; None
    of those that are no codes.
    """

    suffix = ""
    _tokenizer: Path | None = None

    def __init__(self, config: Mapping[str, Json]) -> None:
        super().__init__(config)
        self.layers: dict[str, tuple[int, bool, int | None] | None] = {}

    @property
    def dense_layers(self) -> list[str]:
        """Those that are no codes."""
        return [name for name, how in self.layers.items() if how is None]

    def take_tokenizer(self, path: Path) -> None:
        self._tokenizer = tokenizer_of(path).parent

    @abc.abstractmethod
    def files(self) -> dict[str, Json]:
        """What stands in the other files, by name, after everything has been declared."""

    def write(
        self, path: Path, tensors: dict[str, Tensor], arrays: Iterator[tuple[str, Shaped[np.ndarray, "..."]]]
    ) -> tuple[str, ...]:
        path.mkdir(exist_ok=True)
        write_safetensors(path / "model.safetensors", tensors, arrays, {"format": "pt"})
        for name, content in self.files().items():
            with replacing(path / name) as file:
                file.write((json.dumps(content, indent=2) + "\n").encode())
        codes = (name.rpartition(".") for name in tensors)
        tables = [f"{stem}.{end}" for stem, _, end in codes if end in ("weight_packed", "qweight") and is_table(stem)]
        notes = [
            f"note: programs that read this folder take codes of linear layers alone, and {name} is of an embedding; "
            "leave it out of the rules"
            for name in tables
        ]
        if torn := [parts for parts in _joined(self.layers) if len({self.layers[name] for name in parts}) > 1]:
            more = f" ({len(torn) - 1} others likewise)" if len(torn) > 1 else ""
            notes.append(
                f"note: vLLM makes one layer of {', '.join(torn[0])}{more}, which wants all of it stored alike, "
                "and these are not; give them one scheme, or none"
            )
        if self._tokenizer is None:
            return tuple(notes)
        copied = [name for name in TOKENIZER_FILES if (self._tokenizer / name).is_file()]
        for name in copied:
            with replacing(path / name) as file:
                file.write((self._tokenizer / name).read_bytes())
        return (*notes, f"note: copied {', '.join(copied)}")


def _joined(layers: Iterable[str]) -> list[list[str]]:
    """Those of which vLLM makes one layer, together.

    Example:
        >>> _joined(["a.q_proj", "a.v_proj", "a.o_proj", "b.q_proj"])
        [['a.q_proj', 'a.v_proj'], ['b.q_proj']]
    """
    found: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for name in layers:
        before, _, last = name.rpartition(".")
        for parts in _JOINED:
            if last in parts:
                found.setdefault((before, parts), []).append(name)
    return list(found.values())


def is_table(module: str) -> bool:
    """Whether a module is an embedding by its name.

    Example:
        >>> is_table("model.embed_tokens"), is_table("model.layers.0.mlp.up_proj")
        (True, False)
    """
    return _TABLE.fullmatch(module) is not None


def plain_layer(item: Item) -> list[str]:
    """The module of an item that is no codes, if a reader may take it for a linear layer."""
    stem, _, end = item.name.rpartition(".")
    return [stem] if stem and end == "weight" and len(item.value.shape) > 1 else []


def tensor(shape: tuple[int, ...], dtype: str) -> Tensor:
    """One of a dtype by its name in numpy.

    Raises:
        ValueError: a dtype that no safetensors file holds.
    """
    if (known := np.dtype(dtype)) not in NAMES:
        raise ValueError(f"expected one of {', '.join(map(str, NAMES))}, got {dtype}; make it another first")
    return Tensor(shape, NAMES[known], int(np.prod(shape, dtype=np.int64)) * known.itemsize)


def plain(item: Item) -> dict[str, Tensor]:
    """An array as it is, a matrix or a filter if its axes are said."""
    return {item.name: tensor(plain_tensor_shape(item.value.shape, item.rule), str(item.value.dtype))}


def encode_plain(item: Item) -> Encoded:
    """The same with its numbers."""
    array = item.value
    assert isinstance(array, np.ndarray)
    return Encoded({item.name: plain_tensor(array, item.rule)}, str(array.dtype))


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    arrays: Iterator[tuple[str, Shaped[np.ndarray, "..."]]],
    metadata: Mapping[str, str],
) -> None:
    """A safetensors file, its tensors in any order; those of wide dtypes lie first, so that all are aligned."""
    check_names(tensors)
    order = sorted(tensors, key=lambda name: -DTYPES[tensors[name].kind].itemsize)
    begin, starts = 0, dict[str, int]()
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    for name in order:
        shape, kind, size = tensors[name]
        entries[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [begin, begin + size]}
        starts[name] = begin
        begin += size
    raw = to_json(entries).encode()
    raw += b" " * (-len(raw) % 8)
    with replacing(path) as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + begin)
        for name, array in arrays:
            file.seek(8 + len(raw) + starts[name])
            file.write(flat(np.ascontiguousarray(array)).data)
