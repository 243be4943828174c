"""`save`: a tree of forms and arrays in an `.lcq` file, or in a set of them."""

import numbers
import os
import reprlib
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import numpy as np
from jaxtyping import PyTree

from lcq.forms.processes import check_agreement, shared_by_processes
from lcq.forms.restored import check_restored
from lcq.io.atomic import check_folder, check_path, replacing
from lcq.io.codecs import CODECS, DEFAULT
from lcq.io.host import check_leaf, gathered, stored
from lcq.io.index import Said, check_metadata, check_plan
from lcq.io.records import Encoder, count_streams
from lcq.io.shard_files import remove_shards, shard_names
from lcq.io.streams import plain_layout
from lcq.io.tree_paths import Leaf, flatten, is_empty
from lcq.io.writing import Job, write_file, write_set


def save(
    path: str | os.PathLike[str],
    tree: PyTree,
    *,
    plan: object = None,
    metadata: Mapping[str, str] | None = None,
    coded: bool = True,
    codecs: Sequence[str] | None = None,
    max_shard_bytes: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> int:
    """Writes a tree of forms and arrays to an `.lcq` file, or a set of them; working forms are packed.

    What is written appears whole or not at all: it is written beside its place, synced, and renamed; of a set the file
    that `path` names comes last. Equal trees give equal bytes.

    Leaves are packed and coded one after another, two of them in memory. Arrays that lie on the devices of several
    processes are gathered likewise; then all processes call this, with the same tree and settings. A single file is
    written by the first. In a set each writes files of its own, of about as many weights, into the one folder. Where
    all arrays are in each process's memory, and no set is asked for, the others only check the tree and return.

    Args:
        path: of the file, replaced if it exists; or of the index of a set, whose other files are beside it.
        tree: forms, arrays, Python numbers (stored as arrays without axes), None; in dicts, lists, tuples, dataclasses,
            flax states, and other pytrees.
        plan: an `lcq.Plan`, or its text, to be kept in the file: how the tree was made, for `lcq.read_plan`.
        metadata: strings by name, such as those of a safetensors header, to be kept in the file for whoever makes it a
            checkpoint again; `read_metadata` of this module gives them back.
        coded: whether codes and masks are entropy-coded, which is smaller; without, every stream is a tensor that any
            reader of safetensors opens, and all are in memory together.
        codecs: names in `lcq.io.CODECS` of those that a coded file's streams are tried with; each stream is coded by
            that which makes it shortest, the first of equals, and is as it is if none takes it. By default "rans".
        max_shard_bytes: makes it a set of files: streams go to files of at most so many bytes each, one that is longer
            to a file of its own.
        progress: called after each stream of a coded file with its number from 1, how many there are (as far as that is
            known before all are packed), and its name; in a set of several processes for those of this one.

    Returns:
        Bytes of the file, or of all files of a set.

    Raises:
        ValueError: a leaf that is no number, a NaN or an infinity in a form, or keys that a file cannot hold, or a dict
            that was a form; names the leaf. A tree in the place of the path. A plan that is no TOML, or longer than 4
            MiB; metadata that are no strings, or as long. Codecs that are not registered, or of a file that is not
            coded. Processes that disagree, or of which one fails.
        OSError: the folder is not there, or the file cannot be written.
    """
    said, names = checked_settings(path, tree, plan, metadata, coded, codecs, max_shard_bytes)
    leaves, _ = flatten(tree)
    for leaf in leaves:
        check_leaf(leaf)
    return write(path, leaves, leaves, said, names, max_shard_bytes, _counted(leaves, progress))


def checked_settings(
    path: str | os.PathLike[str],
    tree: PyTree,
    plan: object,
    metadata: Mapping[str, str] | None,
    coded: bool,
    codecs: Sequence[str] | None,
    max_shard_bytes: int | None,
) -> tuple[Said, Sequence[str] | None]:
    """What a file says beside its leaves, and the names of codecs to try, None if it is not coded.

    Raises:
        ValueError, OSError: as `save`, for all but the leaves.
    """
    check_path(path, "lcq.save(path, tree)")
    number = isinstance(max_shard_bytes, numbers.Real) and not isinstance(max_shard_bytes, bool)
    if max_shard_bytes is not None and not (number and max_shard_bytes > 0):
        raise ValueError(
            f"expected max_shard_bytes= a number above 0, or None, got {max_shard_bytes!r}; 5 GB are 5 * 10**9"
        )
    if max_shard_bytes is not None and not coded:
        raise ValueError("expected a coded file with max_shard_bytes=, got coded=False; leave one of the two out")
    shared = max_shard_bytes is not None and jax.process_count() > 1
    if jax.process_index() == 0 or shared:
        check_folder(path)
    check_restored(tree)
    said: Said = {} if plan is None else {"plan": _plan_text(plan)}
    if metadata:
        check_metadata(kept := dict(metadata))
        said |= {"metadata": dict(sorted(kept.items()))}
    names = _codec_names(codecs, coded)
    return said, names if coded else None


def write(
    path: str | os.PathLike[str],
    known: Sequence[Leaf],
    made: Iterable[Leaf],
    said: Said,
    codecs: Sequence[str] | None,
    most: int | None,
    told: Callable[[int, list[str]], None],
) -> int:
    """Writes leaves as they are made.

    Args:
        path: of the file, or of the index of a set.
        known: of every leaf its place, and arrays of about as many bytes, on the devices where it is.
        made: the leaves, in the same order.
        said: what the index says beside them.
        codecs: names of those to try; None for a file that is not coded.
        most: bytes of each file of a set; None for a single one.
        told: called after each leaf with its number from 0 and the names of its streams.

    Returns, raises: as `save`.
    """
    values = [leaf.value for leaf in known]
    together = shared_by_processes(values) or (most is not None and jax.process_count() > 1)
    if together:
        check_agreement("leaves and settings of save", _summary(path, known, said, codecs, most), "save one tree")
    before = shard_names(path)
    if codecs is None:
        encoder = Encoder()
        records = [encoder.encode(stored(gathered(leaf))) for leaf in made]
        pieces = plain_layout(records, encoder, said)
        size = sum(map(len, pieces))
        if jax.process_index() == 0:
            with replacing(path) as file:
                file.writelines(pieces)
    else:
        count = jax.process_count() if together and most is not None else 1
        here = jax.process_index() if together else 0
        mine = [owner == here for owner in _owners(values, count)]
        job = Job(os.fspath(path), made, mine, together, said, codecs, told)
        size = write_file(job) if most is None else write_set(job, most, before)
    if jax.process_index() == 0:
        remove_shards(path, before - shard_names(path))
    return size


def _owners(values: Sequence[PyTree], processes: int) -> list[int]:
    """Which process writes which leaf, about as many bytes each; the same in all."""
    load, owners = [0] * processes, []
    for value in values:
        least = load.index(min(load))
        load[least] += sum(getattr(array, "nbytes", 8) for array in jax.tree.leaves(value))
        owners.append(least)
    return owners


def _summary(
    path: str | os.PathLike[str], leaves: Sequence[Leaf], said: Said, codecs: Sequence[str] | None, most: int | None
) -> list[str]:
    """What processes that save together have to agree in."""
    settings = f"codecs={codecs}, max_shard_bytes={most}" + f", {os.path.basename(path)}" * (most is not None)
    shapes = [
        (leaf.path, jax.tree.structure(leaf.value), [np.shape(a) for a in jax.tree.leaves(leaf.value)])
        for leaf in leaves
    ]
    return [*(f"{path}: {shapes} in {structure}" for path, structure, shapes in shapes), settings, str(said)]


def _counted(
    leaves: Sequence[Leaf], progress: Callable[[int, int, str], None] | None
) -> Callable[[int, list[str]], None]:
    """`progress` as `write` calls it: with the streams that are, and those that are still expected."""
    seen: set[str] = set()
    expected = [0 if is_empty(leaf) else count_streams(leaf.value, seen) for leaf in leaves] if progress else []
    left, done = sum(expected), 0

    def told(number: int, names: list[str]) -> None:
        nonlocal left, done
        if progress is None:
            return
        left -= expected[number]
        total = done + len(names) + left
        for name in names:
            done += 1
            progress(done, total, name)

    return told


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
