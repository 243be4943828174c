"""The `.lcq` file: a tree of forms and arrays in one file, checked from end to end.

It is a safetensors file (`container`), whose streams lie one to a tensor or entropy-coded in one block (`index`), or in
files of a set (`shard_files`).
"""

import functools
import math
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from io import BufferedReader

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from lcq.forms.base import is_form
from lcq.forms.placement import place
from lcq.forms.validate import named
from lcq.io.atomic import replacing
from lcq.io.container import Json, bytes_of, open_container
from lcq.io.index import AT_ONCE, Contents, contents_of
from lcq.io.records import decode
from lcq.io.saving import save
from lcq.io.shard_files import open_shard
from lcq.io.tree_paths import Leaf, check_paths, flatten, is_empty, nest
from lcq.tree.aliases import Forms

__all__ = ["ArtifactError", "each_leaf", "load", "read_index", "read_metadata", "replacing", "save"]

_LONG = 1 << 18  # bytes of a stream for which a thread pays

LIMIT = 16 * 2**30
"""Bytes that any file may declare unless told otherwise: its streams, and its forms made dense."""

PER_BYTE = 64
"""And for each byte that it has on disk: float32 from half a bit a weight."""


class ArtifactError(ValueError):
    """A file is not what it should be: damaged, of another kind or version, too large, or of another tree."""


def load(
    path: str | os.PathLike[str],
    like: PyTree = None,
    limit: float | None = None,
    *,
    on_device: bool = False,
    shardings: PyTree = None,
) -> Forms:
    """Reads what `save` wrote, one file or a set: a tree of stored forms and numpy arrays.

    Everything the files declare is checked before memory is taken for it, and every byte by a digest.

    Args:
        path: of the file, or of the index of a set.
        like: a tree of arrays, shape structs or forms, whose structure is restored; every leaf must be in the file with
            the same shape, and nothing else; dtypes are those of the file. By default nested dicts and lists:
            attributes come back as string keys, tuples as lists.
        limit: bytes that the file's streams, the decoding of one, and its forms made dense may take together. By
            default 16 GiB, and 64 bytes for each that the files have on disk if that is more: a small file that
            declares much is refused, and a large net is not.
        on_device: whether codes are decoded on JAX's default device and stay there, so that only their short streams
            travel; that takes some 16 bytes of its memory a code, of one stream at a time. Other arrays stay here.
        shardings: where leaves are to lie: a `jax.sharding.Sharding` for all, or a tree of them like the result, with
            None for what stays here. Of several processes all call this; how many wrote the file does not matter. Forms
            come in the working layout, their codes sharded like the leaf and what they have for each block along
            with them where the blocks divide; leaves are read one by one, so that one is in the memory of a process.

    Raises:
        ArtifactError: the file is damaged, is not an `.lcq` file, declares more than `limit`, or does not fit `like`;
            names the tensor. A file of the set that is missing, or another's.
        ValueError: a limit that is no number of bytes; shardings of other leaves, or that cannot cut one; names it.
        OSError: the file cannot be opened or read.

    Example:
        >>> import tempfile
        >>> from lcq.forms import Cast
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     size = save(f"{folder}/net.lcq", {"bias": Cast(jnp.ones(2, jnp.bfloat16))})
        ...     load(f"{folder}/net.lcq")["bias"].dense()
        Array([1., 1.], dtype=float32)
    """
    if limit is not None and not (isinstance(limit, int | float) and limit > 0):
        raise ValueError(f"expected limit= in bytes, as {LIMIT}, got {limit!r}")
    places = None if shardings is None else _places(shardings)
    with open(path, "rb") as file:
        try:
            held, declared, names = _declared(file, limit)
            _check_size(held, declared, limit)
            if like is not None:
                _restore(declared, like)
        except (ValueError, RecursionError, MemoryError) as error:
            raise ArtifactError(f"{os.fspath(path)}: {error}") from error
        if places is not None:
            _check_places(declared, places)
        leaves = []
        for stored_leaf in _decoded(path, held, names, on_device):
            leaves.append(stored_leaf if places is None else _placed(stored_leaf, places))
    return nest(leaves) if like is None else _restore(leaves, like)


def declared_leaves(path: str | os.PathLike[str]) -> list[Leaf]:
    """The leaves of a file with shape structs for arrays; of the file only the index is read, and checked.

    Raises:
        ArtifactError: as `load`, for the index.
        OSError: the file cannot be opened or read.
    """
    with open(path, "rb") as file:
        try:
            return _declared(file, None)[1]
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
            return _contents(file, None)
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"{os.fspath(path)}: {error}") from error


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The strings that were saved with a file as `metadata`; only the index is read.

    Raises:
        ArtifactError, OSError: as `read_index`.
    """
    return read_index(path).metadata


def each_leaf(path: str | os.PathLike[str], limit: float | None = None) -> Iterator[tuple[Json, Leaf]]:
    """Every leaf of a file with its record, one after another; nothing is made dense, and only one is held.

    All that `load` checks is checked, every digest among it, but the size of all leaves together and of their dense
    forms: of one leaf at a time the streams and their decoding count.

    Args:
        path: of the file.
        limit: bytes that one leaf may take; by default as `load` for a whole file.

    Raises:
        ArtifactError, OSError: as `load`.
    """
    with open(path, "rb") as file:
        try:
            held, declared, names = _declared(file, limit)
            most = _most(held, limit)
            for record, leaf, of_leaf in zip(held.records, declared, names, strict=True):
                if (size := sum(bytes_of(held.structs[name]) + held.decoding[name] for name in of_leaf)) > most:
                    raise ValueError(
                        f"{leaf.path[:200]}: expected at most {most:.0f} bytes for a leaf; the file declares {size}; "
                        "raise limit= if you trust it"
                    )
                yield record, decode(record, lambda name: held.read(name, False))
        except (ValueError, RecursionError, MemoryError) as error:
            raise ArtifactError(f"{os.fspath(path)}: {error}") from error


def _contents(file: BufferedReader, limit: float | None) -> Contents:
    size = os.fstat(file.fileno()).st_size
    most = int(min(max(LIMIT, PER_BYTE * size) if limit is None else limit, 1 << 62))
    return contents_of(open_container(file, size), size, most, functools.partial(open_shard, file.name))


def _most(held: Contents, limit: float | None) -> float:
    """Bytes that what is in a file may take."""
    return max(LIMIT, PER_BYTE * held.on_disk) if limit is None else limit


def _check_size(held: Contents, declared: list[Leaf], limit: float | None) -> None:
    most = _most(held, limit)
    forms = sum(
        math.prod(leaf.value.shape) * jnp.dtype(leaf.value.dtype).itemsize for leaf in declared if is_form(leaf.value)
    )
    if forms + held.bytes > most:
        raise ValueError(
            f"expected at most {int(min(most, 1 << 62))} bytes; the file declares {held.bytes} of streams and {forms} "
            "of forms made dense; raise limit= if you trust it"
        )


def _decoded(
    path: str | os.PathLike[str], held: Contents, names: list[dict[str, None]], on_device: bool
) -> Iterator[Leaf]:
    """The leaves of a file, one after another; streams that several share are kept until the last of them."""
    uses = Counter(name for of_leaf in names for name in of_leaf)
    kept: dict[str, Future[jax.Array | np.ndarray]] = {}

    def begin(name: str) -> Future[jax.Array | np.ndarray]:
        """Long streams are decoded beside others; those of a device by the thread whose settings say which."""
        if bytes_of(held.structs[name]) >= _LONG and not on_device:
            return threads.submit(held.read, name, False)
        done: Future[jax.Array | np.ndarray] = Future()
        done.set_result(held.read(name, on_device))
        return done

    def stream(name: str) -> jax.Array | np.ndarray:
        return kept[name].result()

    try:
        with ThreadPoolExecutor(AT_ONCE) as threads:
            for number, record in enumerate(held.records):
                for of_leaf in names[number : number + AT_ONCE]:
                    kept.update({name: begin(name) for name in of_leaf if name not in kept})
                leaf = decode(record, stream)
                uses.subtract(list(names[number]))
                for name in names[number]:
                    if not uses[name]:
                        del kept[name]
                yield leaf
    except (ValueError, RecursionError, MemoryError) as error:
        raise ArtifactError(f"{os.fspath(path)}: {error}") from error


def _declared(file: BufferedReader, limit: float | None) -> tuple[Contents, list[Leaf], list[dict[str, None]]]:
    """What a file holds, its leaves with shape structs for arrays, checked as far as that goes, and their streams."""
    held = _contents(file, limit)
    used: list[dict[str, None]] = []

    def declared(name: str) -> jax.ShapeDtypeStruct:
        if name not in held.structs:
            raise ValueError(f"{name[:200]}: the file has no such tensor")
        used[-1][name] = None
        return held.structs[name]

    leaves = []
    for record in held.records:
        used.append({})
        leaves.append(decode(record, declared))
    check_paths(leaves)
    if unused := held.structs.keys() - {name for of_leaf in used for name in of_leaf}:
        raise ValueError(f"{min(unused)}: no leaf has this tensor")
    nest(leaves)
    return held, leaves, used


def _places(shardings: PyTree) -> dict[str, jax.sharding.Sharding | None] | jax.sharding.Sharding:
    """Shardings by path, or one for all."""
    if isinstance(shardings, jax.sharding.Sharding):
        return shardings
    places = {leaf.path: leaf.value for leaf in flatten(shardings)[0]}
    for path, place_of in places.items():
        if not isinstance(place_of, jax.sharding.Sharding | None):
            where = f"{path}: " if path else ""
            raise ValueError(f"{where}expected a sharding or None in shardings=, got {type(place_of).__name__}")
    return places


def _check_places(leaves: list[Leaf], places: dict[str, jax.sharding.Sharding | None] | jax.sharding.Sharding) -> None:
    if isinstance(places, jax.sharding.Sharding):
        return
    paths = {leaf.path for leaf in leaves if not is_empty(leaf)}
    wanted = {path for path, place_of in places.items() if place_of is not None}
    remedy = "give a sharding or None for each leaf of the file"
    for message, some in (("shardings= has no", paths - places.keys()), ("the file has no", wanted - paths)):
        if some:
            listed = ", ".join(sorted(some)[:4])
            raise ValueError(f"{message} {listed} ({len(some)} of {len(paths | wanted)} leaves); {remedy}")


def _placed(leaf: Leaf, places: dict[str, jax.sharding.Sharding | None] | jax.sharding.Sharding) -> Leaf:
    onto = places if isinstance(places, jax.sharding.Sharding) else places.get(leaf.path)
    if is_empty(leaf) or onto is None:
        return leaf
    with named(leaf.path):
        return leaf._replace(value=place(leaf.value, onto))


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
