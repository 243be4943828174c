"""Several processes, each of which reads only its own devices (`jax.distributed`): what they tell each other.

What is here is called by every process, in the same order, or by none: a process that waits for another waits for ever.
So it is asked for only where an array lies on the devices of several, which nothing can be done with by one alone.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree


def readable(array: Any) -> bool:
    """Whether this process can read the whole of an array, or of what is none."""
    if not isinstance(array, jax.Array) or isinstance(array, jax.core.Tracer):
        return True
    return array.is_fully_addressable or array.is_fully_replicated


def shared_by_processes(tree: PyTree) -> bool:
    """Whether some array of a tree lies on the devices of several processes, none of which can read it."""
    return not all(map(readable, jax.tree.leaves(tree)))


def on_host(tree: PyTree) -> Any:
    """A tree whose arrays this process can read; those that lie on the devices of several are gathered, one by one.

    A gathered array is whole in the memory of every process, so give it a leaf at a time.
    """
    return jax.tree.map(
        lambda array: array if readable(array) else multihost_utils.process_allgather(array, tiled=True), tree
    )


def exchange(text: str) -> list[str]:
    """The texts of all processes, in their order."""
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([data.size], np.int32)).reshape(-1)
    longest = 1 << int(sizes.max()).bit_length()  # few lengths, few programs
    rows = multihost_utils.process_allgather(np.pad(data, (0, longest - data.size))).reshape(len(sizes), -1)
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


def check_agreement(what: str, said: Sequence[str], remedy: str) -> None:
    """Raises in every process unless all say the same.

    Args:
        what: these are, in words.
        said: texts, such as those of rules, one for each.
        remedy: what to do.

    Raises:
        ValueError: shows the first text that differs, of process 0 and of the first that does not agree with it.
    """
    mine = json.dumps(list(said))
    digests = exchange(hashlib.blake2b(mine.encode(), digest_size=16).hexdigest())
    other = next((i for i, digest in enumerate(digests) if digest != digests[0]), None)
    if other is None:
        return
    everyones = exchange(mine)
    first, second = (json.loads(everyones[i]) for i in (0, other))
    longest = max(len(first), len(second))
    at = next(i for i in range(longest) if first[i : i + 1] != second[i : i + 1])
    texts = [f"{each[at]:.300}" if at < len(each) else "none" for each in (first, second)]
    raise ValueError(
        f"expected the same {what} in all {len(digests)} processes, got {texts[0]} in process 0 and {texts[1]} in "
        f"process {other}, number {at + 1} of them; {remedy}"
    )
