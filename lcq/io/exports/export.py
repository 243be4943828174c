"""Forms to files of other programs, a leaf at a time."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import PyTree, Shaped

from lcq.forms.validate import named
from lcq.io.container import Json
from lcq.io.exports.base import EXPORT_FORMATS, Tensor
from lcq.io.exports.leaves import items_of
from lcq.io.exports.names import Name
from lcq.io.exports.report import Report, Row


def export(
    forms: PyTree | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    format: str,
    names: Sequence[Name] = (),
    config: Mapping[str, Json] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    nearest: int | None = None,
    limit: float | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Report:
    """Writes forms as another program reads them, with the codes that they have.

    Codes go out as they are, for whatever the format calls value = scale (code - zero). What a format cannot hold is
    refused by leaf; what it rounds, such as scales to float16, is in the report.

    Args:
        forms: a tree of forms and arrays, or the path of an `.lcq` file, which is read a leaf at a time.
        path: of the file or folder to write.
        format: a name in `EXPORT_FORMATS`.
        names: what leaves are called there, and which of their axes are outputs; the first that matches decides.
            By default keys joined by ".", and flax's names in PyTorch's words, `kernel` [in, out] as `weight`.
        config: what the format keeps beside the weights: the config.json of a Hugging Face model, or metadata of GGUF.
        tokenizer: the path of a tokenizer.json, or its folder. GGUF has it in its metadata, if it is of byte pairs on
            bytes or on pieces of sentencepiece; folders get a copy of its files; others refuse it.
        nearest: bits of the grid that takes the place of tables without one (`KMeans`); masks, factors and sums are
            then made dense. None refuses them, and says what they would cost.
        limit: bytes that one leaf of a file may take; by default as `lcq.load` for a whole file.
        progress: called after each tensor with its number from 1, how many there are, and the leaf's path.

    Returns:
        What was written, a row for each tensor, and what changed.

    Raises:
        ValueError: a format that is not known, nothing to write, names that do not fit, or a leaf that the format
            cannot hold; names it and what to do. A tokenizer that it cannot hold.
        OSError: the file cannot be written, or the tokenizer not be read.

    Example:
        >>> import tempfile, lcq, numpy as np
        >>> w = {"up": {"kernel": np.linspace(-1, 1, 2048, dtype=np.float32).reshape(64, 32)}}
        >>> forms = lcq.compress(w, [lcq.Rule(".*", lcq.Uniform(4, per=32))])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     print(export(forms, f"{folder}/net", format="compressed-tensors"))
        leaf       tensor     as                    bytes  error  because of
        up/kernel  up.weight  int4 in groups of 32  1,168  exact
    """
    known, path = EXPORT_FORMATS[format](config or {}), Path(path)
    if known.suffix and path.suffix != known.suffix:
        raise ValueError(
            f"{path}: expected a name that ends in {known.suffix}, got another; write {path.stem + known.suffix}"
        )
    if tokenizer is not None:
        known.take_tokenizer(Path(tokenizer))
    items = items_of(forms, names, known.names, nearest, limit)
    tensors: dict[str, Tensor] = {}
    for item in items.declared:
        with named(item.path):
            made = known.declare(item)
            if both := sorted(tensors.keys() & made.keys()):
                raise ValueError(
                    f"expected names of its own for what it becomes, got {', '.join(both)}, which another leaf has; "
                    "say another lcq.io.Name for one of them"
                )
            tensors |= made
    rows: list[Row] = []

    def arrays() -> Iterator[tuple[str, Shaped[np.ndarray, "..."]]]:
        for number, item in enumerate(items.read(), 1):
            with named(item.path):
                encoded = known.encode(item)
            error = float(np.hypot(item.error, encoded.error))
            why = ", ".join(filter(None, [item.why, encoded.why]))
            size = sum(tensors[name].size for name in encoded.arrays)
            rows.append(Row(item.path, item.name, encoded.what, size, error, why))
            yield from encoded.arrays.items()
            if progress is not None:
                progress(number, len(items.declared), item.path)

    notes = known.write(path, tensors, arrays())
    return Report(str(path), tuple(rows), tuple(notes))
