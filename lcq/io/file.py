"""The `.lcq` file: a tree of forms and arrays in one file, checked from end to end.

It is a safetensors file (`container`), whose streams lie one to a tensor or entropy-coded in one block (`layouts`).
"""

import contextlib
import errno
import math
import os
import reprlib
import secrets
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from lcq.forms.base import Form, is_form, is_split
from lcq.forms.restored import check_restored
from lcq.forms.validate import named
from lcq.io.codecs import CODECS, DEFAULT
from lcq.io.container import NAMES, Json, bytes_of, open_container
from lcq.io.index import Contents, Said, check_metadata, check_plan, coded_layout, contents_of, plain_layout
from lcq.io.records import Encoder, decode
from lcq.io.tree_paths import Leaf, check_paths, flatten, is_empty, nest
from lcq.tree.aliases import Forms
from lcq.tree.lazy import whole

LIMIT = 16 * 2**30
"""Bytes that a file may declare unless told otherwise: its streams, and its forms made dense."""


class ArtifactError(ValueError):
    """A file is not what it should be: damaged, of another kind or version, too large, or of another tree."""


def save(
    path: str | os.PathLike[str],
    tree: PyTree,
    *,
    plan: object = None,
    metadata: Mapping[str, str] | None = None,
    coded: bool = True,
    codecs: Sequence[str] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> int:
    """Writes a tree of forms and arrays to an `.lcq` file; working forms are packed.

    The file appears whole or not at all: it is written beside its place, synced, and renamed. Equal trees give equal
    bytes. Of several processes only the first writes; the others check the tree and return.

    Args:
        path: of the file, replaced if it exists.
        tree: forms, arrays, Python numbers (stored as arrays without axes), None; in dicts, lists, tuples, dataclasses,
            flax states, and other pytrees.
        plan: an `lcq.Plan`, or its text, to be kept in the file: how the tree was made, for `lcq.read_plan`.
        metadata: strings by name, such as those of a safetensors header, to be kept in the file for whoever makes it a
            checkpoint again; `read_metadata` of this module gives them back.
        coded: whether codes and masks are entropy-coded, which is smaller; without, every stream is a tensor that any
            reader of safetensors opens.
        codecs: names in `lcq.io.CODECS` of those that a coded file's streams are tried with; each stream is coded by
            that which makes it shortest, the first of equals, and is as it is if none takes it. By default "rans".
        progress: called after each stream of a coded file with its number from 1, how many there are, and its name.

    Returns:
        Bytes of the file.

    Raises:
        ValueError: a leaf that is no number or not on this host, a NaN or an infinity in a form, or keys that a file
            cannot hold, or a dict that was a form; names the leaf. A plan that is no TOML, or longer than 4 MiB;
            metadata that are no strings, or as long. Codecs that are not registered, or of a file that is not coded.
        OSError: the folder is not there, or the file cannot be written.
    """
    if jax.process_index() == 0:
        _check_folder(path)
    check_restored(tree)
    said: Said = {} if plan is None else {"plan": _plan_text(plan)}
    if metadata:
        check_metadata(kept := dict(metadata))
        said |= {"metadata": dict(sorted(kept.items()))}
    names = _codec_names(codecs, coded)
    encoder = Encoder()
    leaves, _ = flatten(tree)
    records = [encoder.encode(_to_host(leaf)) for leaf in leaves]
    if coded:
        pieces = coded_layout(records, encoder, said, names, progress)
    else:
        pieces = plain_layout(records, encoder, said)
    if jax.process_index() == 0:
        with replacing(path) as file:
            for piece in pieces:
                file.write(piece)
    return sum(map(len, pieces))


def load(path: str | os.PathLike[str], like: PyTree = None, limit: float = LIMIT, *, on_device: bool = False) -> Forms:
    """Reads what `save` wrote: a tree of stored forms and numpy arrays.

    Everything the file declares is checked before memory is taken for it, and every byte by a digest.

    Args:
        path: of the file.
        like: a tree of arrays, shape structs or forms, whose structure is restored; every leaf must be in the file with
            the same shape, and nothing else; dtypes are those of the file. By default nested dicts and lists:
            attributes come back as string keys, tuples as lists.
        limit: bytes that the file's streams, the decoding of one, and its forms made dense may take together.
        on_device: whether codes are decoded on JAX's default device and stay there, so that only their short streams
            travel; that takes some 16 bytes of its memory a code, of one stream at a time. Other arrays stay here.

    Raises:
        ArtifactError: the file is damaged, is not an `.lcq` file, declares more than `limit`, or does not fit `like`;
            names the tensor.
        ValueError: a limit that is no number of bytes.
        OSError: the file cannot be opened or read.

    Example:
        >>> import tempfile
        >>> from lcq.forms import Cast
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     size = save(f"{folder}/net.lcq", {"bias": Cast(jnp.ones(2, jnp.bfloat16))})
        ...     load(f"{folder}/net.lcq")["bias"].dense()
        Array([1., 1.], dtype=float32)
    """
    if not isinstance(limit, int | float) or not limit > 0:
        raise ValueError(f"expected limit= in bytes, as {LIMIT}, got {limit!r}")
    with open(path, "rb") as file:
        try:
            leaves = _read(file, int(min(limit, 1 << 62)), on_device)
            return nest(leaves) if like is None else _restore(leaves, like)
        except (ValueError, RecursionError, MemoryError) as error:
            raise ArtifactError(f"{os.fspath(path)}: {error}") from error


def declared_leaves(path: str | os.PathLike[str]) -> list[Leaf]:
    """The leaves of a file with shape structs for arrays; of the file only the index is read, and checked.

    Raises:
        ArtifactError: as `load`, for the index.
        OSError: the file cannot be opened or read.
    """
    with open(path, "rb") as file:
        try:
            return _declared(file, LIMIT)[1]
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"{os.fspath(path)}: {error}") from error


def read_index(path: str | os.PathLike[str]) -> Contents:
    """What a file says it holds; of the file only the index is read, and checked, and no stream.

    Raises:
        ArtifactError: as `load`, for the index.
        OSError: the file cannot be opened or read.
    """
    with open(path, "rb") as file:
        try:
            return _contents(file, LIMIT)
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"{os.fspath(path)}: {error}") from error


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The strings that were saved with a file as `metadata`; only the index is read.

    Raises:
        ArtifactError, OSError: as `read_index`.
    """
    return read_index(path).metadata


def each_leaf(path: str | os.PathLike[str], limit: float = LIMIT) -> Iterator[tuple[Json, Leaf]]:
    """Every leaf of a file with its record, one after another; nothing is made dense, and only one is held.

    All that `load` checks is checked, every digest among it, but the size of all leaves together and of their dense
    forms: of one leaf at a time the streams and their decoding count.

    Args:
        path: of the file.
        limit: bytes that one leaf may take.

    Raises:
        ArtifactError, OSError: as `load`.
    """
    with open(path, "rb") as file:
        try:
            held, declared = _declared(file, int(min(limit, 1 << 62)))
            for record, leaf in zip(held.records, declared, strict=True):
                if (size := _memory(record, held)) > limit:
                    raise ValueError(
                        f"{leaf.path[:200]}: expected at most {limit:.0f} bytes for a leaf; the file declares {size}; "
                        "raise limit= if you trust it"
                    )
                yield record, decode(record, lambda name: held.read(name, False))
        except (ValueError, RecursionError, MemoryError) as error:
            raise ArtifactError(f"{os.fspath(path)}: {error}") from error


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file open for writing that takes the place of `path` when the block ends, and vanishes if the block fails."""
    _check_folder(path)
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


def _check_folder(path: str | os.PathLike[str]) -> None:
    """Raises unless the folder of a file is there."""
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder):
        raise FileNotFoundError(errno.ENOENT, "no such folder; make it, or choose another name", folder)


def _to_host(leaf: Leaf) -> Leaf:
    """The leaf with its form stored and its arrays in this host's memory."""
    if is_empty(leaf):
        return leaf
    if not is_form(leaf.value):
        return leaf._replace(value=host_array(leaf.path, whole(leaf.value)))
    for array in jax.tree.leaves(leaf.value):
        host_array(leaf.path, array, look=False)
    with named(leaf.path):
        form = _packed(leaf.value)
    return leaf._replace(value=jax.tree.map(lambda array: host_array(leaf.path, array), form))


def _packed(form: Form) -> Form:
    if is_split(form):
        try:
            form.check_stored()
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"expected forms or arrays, got an optimizer state, which holds the {type(form).__name__} in two "
                "parts; call lcq.extract(state, params) and save what it gives"
            ) from error
    return form.pack()


def host_array(path: str, leaf: object, look: bool = True) -> np.ndarray:
    """A leaf as a numpy array of a dtype that files can hold; `look=False` only checks that this will work."""
    match leaf:
        case jax.core.Tracer():
            raise ValueError(f"{path}: expected a concrete array, got a traced one; save outside of jit")
        case jax.Array() if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise ValueError(
                f"{path}: expected numbers, got a PRNG key; save jax.random.key_data(key), or leave it out"
            )
        case jax.Array() if leaf.is_deleted():
            raise ValueError(f"{path}: expected an array, got a deleted one (donated?); save before it is given away")
        case jax.Array() if not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            raise ValueError(
                f"{path}: expected an array that this process can read, got {leaf.dtype}{list(leaf.shape)} "
                "sharded over several processes; gather it first (jax.experimental.multihost_utils.process_allgather)"
            )
        case jax.Array() | np.ndarray() | np.generic() | bool() | int() | float() | complex():
            pass
        case _:
            raise ValueError(
                f"{path or 'the tree'}: expected an array, a number or None, got {type(leaf).__name__}; "
                + ("leave it out" if path else "pass save(path, tree)")
            )
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
    if dtype.newbyteorder("=") not in NAMES:
        raise ValueError(f"{path}: expected one of {', '.join(map(str, NAMES))}, got {dtype}; convert it first")
    return np.asarray(leaf, dtype.newbyteorder("="), order="C") if look else np.empty(0)


def _codec_names(codecs: Sequence[str] | None, coded: bool) -> Sequence[str]:
    """The names of codecs to try, each of which is registered."""
    if codecs is not None and not coded:
        raise ValueError(f"expected no codecs= for a file that is not coded, got {codecs!r}; leave one of the two out")
    if isinstance(codecs, str):
        raise ValueError(f"expected codecs= a list of names, got {codecs!r}; write [{codecs!r}]")
    for name in codecs or ():
        CODECS[name]
    return DEFAULT if codecs is None else codecs


def _plan_text(plan: object) -> str:
    """The text of a plan, looked at as far as this floor can: it is TOML and not too long."""
    text = str(plan)
    try:
        tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ValueError(
            f"expected plan= an lcq.Plan(rules), or its text, got {reprlib.repr(plan)} ({error})"
        ) from error
    check_plan(text)
    return text


def _contents(file: BufferedReader, limit: int) -> Contents:
    return contents_of(open_container(file, os.fstat(file.fileno()).st_size), limit)


def _read(file: BufferedReader, limit: int, on_device: bool) -> list[Leaf]:
    held, leaves = _declared(file, limit)
    forms = sum(
        math.prod(leaf.value.shape) * jnp.dtype(leaf.value.dtype).itemsize for leaf in leaves if is_form(leaf.value)
    )
    if forms + held.bytes > limit:
        raise ValueError(
            f"expected at most {limit} bytes; the file declares {held.bytes} of streams and {forms} of forms made "
            "dense; raise limit= if you trust it"
        )
    arrays = {name: held.read(name, on_device) for name in held.structs}
    return [decode(record, arrays.__getitem__) for record in held.records]


def _declared(file: BufferedReader, limit: int) -> tuple[Contents, list[Leaf]]:
    """What a file holds, and its leaves with shape structs for arrays, checked as far as that goes."""
    held = _contents(file, limit)
    used: set[str] = set()

    def declared(name: str) -> jax.ShapeDtypeStruct:
        if name not in held.structs:
            raise ValueError(f"{name[:200]}: the file has no such tensor")
        used.add(name)
        return held.structs[name]

    leaves = [decode(record, declared) for record in held.records]
    check_paths(leaves)
    if unused := held.structs.keys() - used:
        raise ValueError(f"{min(unused)}: no leaf has this tensor")
    nest(leaves)
    return held, leaves


def _memory(record: Json, held: Contents) -> int:
    """Bytes that the streams of one leaf and their decoding take."""
    used: set[str] = set()

    def declared(name: str) -> jax.ShapeDtypeStruct:
        used.add(name)
        return held.structs[name]

    decode(record, declared)
    return sum(bytes_of(held.structs[name]) + held.decoding[name] for name in used)


def _restore(leaves: list[Leaf], like: PyTree) -> Forms:
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
                f"{leaf.path}: expected {list(np.shape(leaf.value))} as in like=, got {list(stored[leaf.path].shape)}"
            )
    return jax.tree.unflatten(structure, [stored[leaf.path] if leaf.path in paths else leaf.value for leaf in wanted])
