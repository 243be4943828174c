"""Parameters of other tools, in and out: .safetensors, whole or in shards, .npz, folders of orbax; .gguf and more in.

Files hold a flat list of named arrays. Names are split at "/", and only there, into nested dicts:
"dense0/kernel" becomes {"dense0": {"kernel": ..}}, while "layers.0.weight" stays one key. So a rule's pattern is
matched against the name as it is in the file, and what is read is written under the same names.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Never

from jaxtyping import PyTree

from lcq.forms.base import is_form
from lcq.io.atomic import check_path
from lcq.io.checkpoints.base import CHECKPOINT_FORMATS, Checkpoint, CheckpointFormat
from lcq.io.checkpoints.shards import INDEX
from lcq.io.host import host_array
from lcq.io.tree_paths import Leaf, flatten, is_empty
from lcq.tree.lazy import whole

_TORCH = "; of torch's files, which may run code, make one with safetensors.torch.save_file"
_HINTS = {".lcq": "; lcq.load and lcq.save are for .lcq files", ".json": "; an index of shards ends in " + INDEX}
_HINTS[".h5"] = "; of Keras write the weights alone: net.save_weights('NAME.weights.h5')"
_HINTS[".gguf"] = "; lcq.io.export writes .gguf"
_HINTS |= {".keras": "; of a .keras file unzip model.weights.h5"}
_HINTS[".eqx"] = "; of equinox's files load the net with eqx.tree_deserialise_leaves"
_HINTS[".msgpack"] = "; of flax's files take flax.serialization.msgpack_restore(data), a tree of arrays"
_HINTS[".npy"] = "; numpy.load reads this one array"
_HINTS |= dict.fromkeys((".pt", ".pth", ".bin", ".ckpt"), _TORCH)


def read(path: str | os.PathLike[str], *, forms: bool = False, lazy: bool = False) -> PyTree:
    """Nested dicts of numpy arrays from a .safetensors, .npz, .gguf or .weights.h5 file, or a folder that orbax wrote.

    A safetensors checkpoint in shards is read whole: give its folder or its index, see
    `lcq.io.checkpoints.shards`. Lists of an orbax checkpoint stay lists, and tuples become lists.

    Weights that are codes in the file (GGUF; compressed-tensors, GPTQ and fp8 in safetensors, by the config.json beside
    them; qwix in orbax) become forms of the same codes, or are made dense.

    Args:
        path: of the file or folder.
        forms: whether codes stay codes, as forms, stored.
        lazy: whether leaves are `lcq.io.MappedArray`s, which are read when they are asked for, as `lcq.quantize` does
            layer by layer; of safetensors and GGUF only, whose blocks are then made dense a slice at a time.

    Raises:
        ValueError: another kind of file, a damaged one, shards that are not whole, or arrays of a dtype without a name
            in numpy; codes that no form holds.
        FileNotFoundError: there is nothing at `path`.

    Example:
        >>> import tempfile, numpy as np
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write(f"{folder}/net.safetensors", {"dense0": {"bias": np.zeros(2)}}, {"format": "np"})
        ...     read_checkpoint(folder)
        Checkpoint(tree={'dense0': {'bias': array([0., 0.])}}, metadata={'format': 'np'}, layout=None)
    """
    return read_checkpoint(path, forms=forms, lazy=lazy).tree


def read_checkpoint(path: str | os.PathLike[str], *, forms: bool = False, lazy: bool = False) -> Checkpoint:
    """What `read` gives, with the metadata of the file and the layout of its weights.

    Raises:
        ValueError, FileNotFoundError: as `read`.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    known = next((known for known in _formats() if known.recognises(path)), None) or _unknown(path)
    if forms and lazy:
        raise ValueError(f"{path}: expected forms=True or lazy=True, got both; forms are read whole")
    if lazy:
        return known.read_lazily(path)
    return known.read_forms(path) if forms else known.read(path)


def write(path: str | os.PathLike[str], tree: PyTree, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a tree of arrays as the kind its name says: .safetensors, .npz, or a new orbax folder if it has no suffix.

    Files appear whole or not at all, and replace what was there; an orbax folder must be new.

    Args:
        path: of the file or folder.
        tree: of arrays.
        metadata: strings by name for the header of a .safetensors file; the other kinds have no place for them.

    Raises:
        ValueError: another kind, a form (call `lcq.decompress` first), a leaf that is no array, a dtype that the kind
            cannot hold, or, in a file, None or an empty container; names the leaf. Metadata for another kind.
    """
    check_path(path, "lcq.io.write(path, tree)")
    path = Path(path)
    kind = format_of(path)
    if metadata and not kind.holds_metadata:
        fitting = " or ".join(known.suffix for known in _formats() if known.holds_metadata)
        raise ValueError(f"{path}: expected a {fitting} file for metadata, got {', '.join(metadata)}; leave it out")
    leaves = [_to_host(leaf) for leaf in flatten(tree)[0]]
    if not kind.holds_empty and any(is_empty(leaf) for leaf in leaves):
        bad = next(leaf for leaf in leaves if is_empty(leaf))
        raise ValueError(
            f"{bad.path}: expected an array, got {bad.value!r}, which {path.suffix} cannot hold; leave it out"
        )
    kind.write(path, leaves, dict(metadata or {}))


def format_of(path: Path) -> CheckpointFormat:
    """The format that the name of a checkpoint to be written says.

    Raises:
        ValueError: a suffix that no format has, or only one that is read alone.
    """
    named = (known for known in _formats() if known.suffix == path.suffix and not known.only_read)
    return next(named, None) or _unknown(path)


def _formats() -> list[CheckpointFormat]:
    """All, the newest first."""
    return [CHECKPOINT_FORMATS[name]() for name in reversed(list(CHECKPOINT_FORMATS))]


def _unknown(path: Path) -> Never:
    both = [known for known in _formats() if known.suffix]
    *some, last = [known.suffix for known in both if not known.only_read]
    others = ", ".join(known.suffix for known in both if known.only_read)
    raise ValueError(
        f"{path}: expected a {', '.join(some)} or {last} file, or an orbax folder without suffix, or, to be read "
        f"alone, {others}{_HINTS.get(path.suffix, '')}"
    )


def _to_host(leaf: Leaf) -> Leaf:
    if is_form(leaf.value):
        raise ValueError(f"{leaf.path}: expected an array, got {type(leaf.value).__name__}; call lcq.decompress first")
    return leaf if is_empty(leaf) else leaf._replace(value=host_array(leaf.path, whole(leaf.value)))
