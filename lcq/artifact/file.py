"""The `.lcq` file: a safetensors file with one tensor per stream, an index, and digests.

    u64 n, little-endian | header: n bytes of JSON, padded by spaces to a multiple of 8 | the streams, one after another

The header is that of safetensors,

    {"__metadata__": {..}, name: {"dtype": "U32", "shape": [3], "data_offsets": [0, 12]}, ..}

with this metadata:

    format    "lcq"
    version   "1"
    index     JSON {"leaves": [record, ..], "digests": {name: digest of the stream}, "plan": TOML}, records as in
              `codec`; the plan, if there is one, is only text here
    digest    of the header, with 32 zeros in the place of this digest

Digests are BLAKE2b of 16 bytes in hexadecimal. They find damage, not forgery: whoever writes a file can write its
digests, so `load` trusts nothing that it has not checked.
"""

import contextlib
import hashlib
import json
import math
import os
import reprlib
import secrets
import struct
import tomllib
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from lcq.artifact.codec import Encoder, decode
from lcq.artifact.paths import Leaf, check_paths, flatten, is_empty, nest
from lcq.base import is_form
from lcq.forms import check_shape

LIMIT = 16 * 2**30
"""Bytes that a file may declare unless told otherwise: its streams, and its forms made dense."""

DTYPES = {
    "BOOL": np.dtype(bool),
    **{f"{kind}{8 * size}": np.dtype(f"{kind.lower()}{size}") for kind in "IU" for size in (1, 2, 4, 8)},
    **{f"F{8 * size}": np.dtype(f"f{size}") for size in (2, 4, 8)},
    "BF16": np.dtype(jnp.bfloat16),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
    "C64": np.dtype(np.complex64),
}
"""Dtypes by their names in a safetensors header."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # as in other readers of safetensors
_LONGEST_PLAN = 1 << 22
_NO_DIGEST = b"0" * 32


class ArtifactError(ValueError):
    """A file is not what it should be: damaged, of another kind or version, too large, or of another tree."""


def save(path: str | os.PathLike[str], tree: Any, *, plan: Any = None) -> int:
    """Writes a tree of forms and arrays to an `.lcq` file; working forms are packed.

    The file appears whole or not at all: it is written beside its place, synced, and renamed. Equal trees give equal
    bytes. Of several processes only the first writes; the others check the tree and return.

    Args:
        path: of the file, replaced if it exists.
        tree: forms, arrays, Python numbers (stored as arrays without axes), None; in dicts, lists, tuples, dataclasses,
            flax states, and other pytrees.
        plan: an `lcq.Plan`, or its text, to be kept in the file: how the tree was made, for `lcq.read_plan`.

    Returns:
        Bytes of the file.

    Raises:
        ValueError: a leaf that is no number or not on this host, a NaN or an infinity in a form, or keys that a file
            cannot hold; names the leaf. A plan that is no TOML, or longer than 4 MiB.
    """
    text = None if plan is None else _plan_text(plan)
    encoder = Encoder()
    leaves, _ = flatten(tree)
    records = [encoder.encode(_to_host(leaf)) for leaf in leaves]
    streams = dict(sorted(encoder.streams.items(), key=lambda item: -item[1].dtype.itemsize))  # keeps all aligned
    header = _header(records, streams, text)
    size = 8 + len(header) + sum(array.nbytes for array in streams.values())
    if jax.process_index() == 0:
        with replacing(path) as file:
            file.write(struct.pack("<Q", len(header)) + header)
            for array in streams.values():
                file.write(_bytes_of(array).data)
    return size


def load(path: str | os.PathLike[str], like: Any = None, limit: int = LIMIT) -> Any:
    """Reads what `save` wrote: a tree of stored forms and numpy arrays.

    Everything the file declares is checked before memory is taken for it, and every byte by a digest.

    Args:
        path: of the file.
        like: a tree of arrays, shape structs or forms, whose structure is restored; every leaf must be in the file with
            the same shape, and nothing else; dtypes are those of the file. By default nested dicts and lists:
            attributes come back as string keys, tuples as lists.
        limit: bytes that the file's streams and its forms made dense may take together.

    Raises:
        ArtifactError: the file is damaged, is not an `.lcq` file, declares more than `limit`, or does not fit `like`;
            names the tensor.
        OSError: the file cannot be opened or read.

    Example:
        >>> import tempfile
        >>> from lcq.forms import Cast
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     size = save(f"{folder}/net.lcq", {"bias": Cast(jnp.ones(2, jnp.bfloat16))})
        ...     load(f"{folder}/net.lcq")["bias"].dense()
        Array([1., 1.], dtype=float32)
    """
    with open(path, "rb") as file:
        try:
            leaves = _read(file, os.fstat(file.fileno()).st_size, limit)
            return nest(leaves) if like is None else _restore(leaves, like)
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"{os.fspath(path)}: {error}") from error


def read_plan_text(path: str | os.PathLike[str]) -> str | None:
    """The text of the plan in a file, None if there is none; of the file only the header is read, and checked.

    Raises:
        ArtifactError: as `load`, for the header.
        OSError: the file cannot be opened or read.
    """
    with open(path, "rb") as file:
        try:
            metadata, _, _ = _read_header(file, os.fstat(file.fileno()).st_size)
            return _read_index(metadata["index"])[2]
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"{os.fspath(path)}: {error}") from error


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file open for writing that takes the place of `path` when the block ends, and vanishes if the block fails."""
    target = os.path.realpath(path)
    temporary = f"{target}.{secrets.token_hex(6)}.tmp"
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):  # where a folder can be opened, the renaming is made to last too
        folder = os.open(os.path.dirname(target), os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _to_host(leaf: Leaf) -> Leaf:
    """The leaf with its form stored and its arrays in this host's memory."""
    if is_empty(leaf):
        return leaf
    if not is_form(leaf.value):
        return leaf._replace(value=host_array(leaf.path, leaf.value))
    for array in jax.tree.leaves(leaf.value):
        host_array(leaf.path, array, look=False)
    try:
        form = leaf.value.pack()
    except ValueError as error:
        raise ValueError(f"{leaf.path}: {error}") from error
    return leaf._replace(value=jax.tree.map(lambda array: host_array(leaf.path, array), form))


def host_array(path: str, leaf: Any, look: bool = True) -> np.ndarray:
    """A leaf as a numpy array of a dtype that files can hold; `look=False` only checks that this will work."""
    match leaf:
        case jax.core.Tracer():
            raise ValueError(f"{path}: wanted a concrete array; got a traced one; save outside of jit")
        case jax.Array() if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise ValueError(f"{path}: wanted numbers; got a PRNG key; save jax.random.key_data(key), or leave it out")
        case jax.Array() if leaf.is_deleted():
            raise ValueError(f"{path}: wanted an array; got a deleted one (donated?); save before it is given away")
        case jax.Array() if not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            raise ValueError(
                f"{path}: wanted an array that this process can read; got {leaf.dtype}{list(leaf.shape)} sharded over "
                "several processes; gather it first (jax.experimental.multihost_utils.process_allgather)"
            )
        case jax.Array() | np.ndarray() | np.generic() | bool() | int() | float() | complex():
            pass
        case _:
            raise ValueError(f"{path}: wanted an array, a number or None; got {type(leaf).__name__}; leave it out")
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
    if dtype.newbyteorder("=") not in _NAMES:
        raise ValueError(f"{path}: wanted one of {', '.join(map(str, _NAMES))}; got {dtype}; convert it first")
    return np.asarray(leaf, dtype.newbyteorder("="), order="C") if look else np.empty(0)


def _plan_text(plan: Any) -> str:
    """The text of a plan, looked at as far as this floor can: it is TOML and not too long."""
    text = str(plan)
    try:
        tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ValueError(f"wanted plan= an lcq.Plan(rules), or its text; got {reprlib.repr(plan)} ({error})") from error
    _check_plan(text)
    return text


def _check_plan(text: str) -> None:
    if (size := len(text.encode())) > _LONGEST_PLAN:
        raise ValueError(f"wanted a plan of at most {_LONGEST_PLAN} bytes; got {size}; patterns can say more in fewer")


def _header(records: list[dict[str, Any]], streams: dict[str, np.ndarray], plan: str | None) -> bytes:
    index: dict[str, Any] = {
        "leaves": records,
        "digests": {name: _digest(_bytes_of(array)) for name, array in streams.items()},
    }
    if plan is not None:
        index["plan"] = plan
    metadata = {"format": "lcq", "version": "1", "index": _json(index)}
    header: dict[str, Any] = {"__metadata__": metadata | {"digest": _NO_DIGEST.decode()}}
    begin = 0
    for name, array in streams.items():
        end = begin + array.nbytes
        header[name] = {"dtype": _NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [begin, end]}
        begin = end
    raw = _json(header).encode()
    raw += b" " * (-len(raw) % 8)
    if len(raw) > _LONGEST_HEADER:
        raise ValueError(
            f"wanted a header of at most {_LONGEST_HEADER} bytes; got {len(raw)}; save fewer leaves per file"
        )
    metadata["digest"] = _digest(raw)
    raw = _json(header | {"__metadata__": metadata}).encode()
    return raw + b" " * (-len(raw) % 8)


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _digest(data: Any) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _bytes_of(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)


class _Tensor(NamedTuple):
    """A tensor that a header declares: `begin` counts from the end of the header."""

    struct: jax.ShapeDtypeStruct
    begin: int
    size: int


def _read(file: BufferedReader, size: int, limit: int) -> list[Leaf]:
    metadata, tensors, start = _read_header(file, size)
    records, digests, _ = _read_index(metadata["index"])
    if odd := digests.keys() ^ tensors.keys():
        raise ValueError(f"{min(odd)}: wanted as many digests as tensors; this has only one of them")
    used: set[str] = set()

    def declared(name: str) -> jax.ShapeDtypeStruct:
        if name not in tensors:
            raise ValueError(f"{name[:200]}: the header has no such tensor")
        used.add(name)
        return tensors[name].struct

    leaves = [decode(record, declared) for record in records]
    check_paths(leaves)
    if unused := tensors.keys() - used:
        raise ValueError(f"{min(unused)}: no leaf has this tensor")
    forms = sum(
        math.prod(leaf.value.shape) * jnp.dtype(leaf.value.dtype).itemsize for leaf in leaves if is_form(leaf.value)
    )
    if forms + size - start > limit:
        raise ValueError(
            f"wanted at most {limit} bytes; the file declares {size - start} of streams and {forms} of forms made "
            "dense; raise limit= if you trust it"
        )
    nest(leaves)
    arrays = {name: _read_tensor(file, start, name, tensors[name], digests[name]) for name in tensors}
    return [decode(record, arrays.__getitem__) for record in records]


def _read_index(text: str) -> tuple[list[Any], dict[str, Any], str | None]:
    """Records, digests, and the plan's text."""
    match _parse(text):
        case {"leaves": [_, *_] as records, "digests": dict(digests), **rest} if not rest:
            return records, digests, None
        case {"leaves": [_, *_] as records, "digests": dict(digests), "plan": str(plan), **rest} if not rest:
            _check_plan(plan)
            return records, digests, plan
    raise ValueError("wanted an index of leaves and digests; got another")


def _read_header(file: BufferedReader, size: int) -> tuple[dict[str, str], dict[str, _Tensor], int]:
    """Metadata, tensors, and where the header ends."""
    first = file.read(8)
    length = int.from_bytes(first, "little")
    if len(first) < 8 or not 2 <= length <= min(size - 8, _LONGEST_HEADER):
        raise ValueError(f"not an lcq file, or cut short: a header of {length} bytes in a file of {size}")
    raw = file.read(length)
    header = _parse(raw.decode("utf-8"))
    match header:
        case {
            "__metadata__": {"format": "lcq", "version": "1", "index": str(index), "digest": str(digest), **rest}
        } if not rest:
            metadata = {"index": index}
        case {"__metadata__": {"format": "lcq", "version": version}} if version != "1":
            raise ValueError(
                f"wanted format version 1; got {reprlib.repr(version)}; read it with the lcq that wrote it"
            )
        case _:
            raise ValueError("not an lcq file: its header does not name the format")
    if raw.count(digest.encode()) != 1 or _digest(raw.replace(digest.encode(), _NO_DIGEST)) != digest:
        raise ValueError("the header is damaged: its digest differs")
    tensors = {name: _tensor(name, entry) for name, entry in header.items() if name != "__metadata__"}
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].size)):
        if tensor.begin != end:
            raise ValueError(f"{name}: wanted data at {end}; got {tensor.begin}")
        end += tensor.size
    if 8 + length + end != size:
        raise ValueError(f"wanted {8 + length + end} bytes; the file has {size}")
    return metadata, tensors, 8 + length


def _tensor(name: str, entry: Any) -> _Tensor:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end], **rest} if (
            not rest and dtype in DTYPES
        ):
            if all(type(n) is int for n in (*shape, begin, end)):
                check_shape(tuple(shape))
                if 0 <= begin and math.prod(shape) * DTYPES[dtype].itemsize == end - begin:
                    return _Tensor(jax.ShapeDtypeStruct(tuple(shape), DTYPES[dtype]), begin, end - begin)
    raise ValueError(
        f"{name[:200]}: wanted a known dtype, a shape, and the offsets of as many bytes; got {reprlib.repr(entry)}"
    )


def _read_tensor(file: BufferedReader, start: int, name: str, tensor: _Tensor, digest: Any) -> np.ndarray:
    data = np.empty(tensor.size, np.uint8)
    file.seek(start + tensor.begin)
    if file.readinto(data.data) != tensor.size or _digest(data) != digest:
        raise ValueError(f"{name}: its data is damaged: the digest differs")
    if tensor.struct.dtype == bool and data.max(initial=0) > 1:
        raise ValueError(f"{name}: wanted truth values 0 and 1; got others")
    return data.view(tensor.struct.dtype).reshape(tensor.struct.shape)


def _parse(text: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key occurs twice in its JSON")
        return dict(pairs)

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} in its JSON")

    return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)


def _restore(leaves: list[Leaf], like: Any) -> Any:
    wanted, structure = flatten(like)
    stored = {leaf.path: leaf.value for leaf in leaves if not is_empty(leaf)}
    paths = {leaf.path for leaf in wanted if not is_empty(leaf)}
    for message, some in (("the file has no", paths - stored.keys()), ("like= has no", stored.keys() - paths)):
        if some:
            raise ValueError(
                f"{message} {', '.join(sorted(some)[:4])} ({len(some)} of {len(paths | stored.keys())} leaves)"
            )
    for leaf in wanted:
        if leaf.path in paths and np.shape(stored[leaf.path]) != np.shape(leaf.value):
            raise ValueError(
                f"{leaf.path}: wanted {list(np.shape(leaf.value))} as in like=; got {list(stored[leaf.path].shape)}"
            )
    return jax.tree.unflatten(structure, [stored[leaf.path] if leaf.path in paths else leaf.value for leaf in wanted])
