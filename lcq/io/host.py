"""Leaves in this host's memory, in the layout of files, one at a time."""

import jax
import jax.numpy as jnp
import numpy as np

from lcq.forms.base import Form, is_form, is_split
from lcq.forms.processes import on_host
from lcq.forms.validate import named
from lcq.io.container import NAMES
from lcq.io.tree_paths import Leaf, is_empty
from lcq.tree.lazy import is_lazy, whole


def check_leaf(leaf: Leaf) -> None:
    """Refuses what no file can hold, as far as can be said without reading an array.

    Raises:
        ValueError: names the leaf.
    """
    if not is_empty(leaf):
        for array in jax.tree.leaves(leaf.value) if is_form(leaf.value) else [leaf.value]:
            check_array(leaf.path, array)


def gathered(leaf: Leaf) -> Leaf:
    """The leaf with what lies on the devices of several processes in the memory of each; all of them call it."""
    return leaf if is_empty(leaf) else leaf._replace(value=on_host(leaf.value))


def stored(leaf: Leaf) -> Leaf:
    """The leaf with its form packed and its arrays as numpy arrays."""
    if is_empty(leaf):
        return leaf
    if not is_form(leaf.value):
        return leaf._replace(value=host_array(leaf.path, whole(leaf.value)))
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


def host_array(path: str, leaf: object) -> np.ndarray:
    """A leaf as a numpy array of a dtype that files can hold."""
    check_array(path, leaf)
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        raise ValueError(
            f"{path}: expected an array that this process can read, got {leaf.dtype}{list(leaf.shape)} "
            "sharded over several processes; gather it first (jax.experimental.multihost_utils.process_allgather)"
        )
    dtype = _dtype(leaf)
    return np.asarray(leaf, dtype.newbyteorder("="), order="C")


def check_array(path: str, leaf: object) -> None:
    """Refuses what is no array, or of a dtype that files cannot hold.

    Raises:
        ValueError: names the leaf.
    """
    match leaf:
        case jax.core.Tracer():
            raise ValueError(f"{path}: expected a concrete array, got a traced one; save outside of jit")
        case jax.Array() if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise ValueError(
                f"{path}: expected numbers, got a PRNG key; save jax.random.key_data(key), or leave it out"
            )
        case jax.Array() if leaf.is_deleted():
            raise ValueError(f"{path}: expected an array, got a deleted one (donated?); save before it is given away")
        case jax.Array() | np.ndarray() | np.generic() | bool() | int() | float() | complex():
            pass
        case _ if is_lazy(leaf):
            pass
        case _:
            raise ValueError(
                f"{path or 'the tree'}: expected an array, a number or None, got {type(leaf).__name__}; "
                + ("leave it out" if path else "pass save(path, tree)")
            )
    dtype = _dtype(leaf)
    if dtype.newbyteorder("=") not in NAMES:
        raise ValueError(f"{path}: expected one of {', '.join(map(str, NAMES))}, got {dtype}; convert it first")


def _dtype(leaf: object) -> np.dtype:
    return np.dtype(leaf.dtype) if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
