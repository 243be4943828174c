"""Nodes of trees that leave the process: in functions that `jax.export` stores, and in what flax writes as msgpack.

A node's arrays go as arrays, its static fields as JSON. Nothing is pickled.
"""

import collections
import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, TypeVar

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import wrapt

_T = TypeVar("_T")

MARK = "form"
"""The entry of a state dict that names the node's type, and holds its static fields: JSON as bytes, an array."""

_registered: collections.Counter[str] = collections.Counter()
"""How often a class of a name came: a cell of a notebook may be run again, and `jax.export` never frees a name."""


def register_node(
    cls: type[_T], static: tuple[str, ...], made: Mapping[str, Callable[[Any], Any]] | None = None
) -> type[_T]:
    """Registers a dataclass that is a pytree node with `jax.export` and with `flax.serialization`.

    What is restored has the static fields that were written, whatever the target's are: with other ones `dense()` would
    be another array. So only the type of the target's node must fit.

    Args:
        cls: registered by `jax.tree_util.register_dataclass`.
        static: names of its static fields, in the order in which they were registered.
        made: for each field that is no string, number, None, or tuple of such: what makes it of a dict of its fields.

    Example:
        >>> import lcq, flax.serialization as fs, jax.numpy as jnp
        >>> form = lcq.KMeans(2).project(jnp.array([-1., 1., 3.]))
        >>> fs.from_bytes(form, fs.to_bytes(form)).dense().tolist()
        [-1.0, 2.0, 2.0]
    """
    make = made or {}
    node_type: type[Any] = cls  # a dataclass, as all nodes are
    arrays = tuple(f.name for f in dataclasses.fields(node_type) if f.name not in static)

    def from_json(text: bytes) -> dict[str, Any]:
        found = {name: _tuples(value) for name, value in json.loads(text).items()}
        return {
            name: make[name](value) if name in make and value is not None else value for name, value in found.items()
        }

    def to_state(flax: ModuleType, node: Any) -> dict[str, Any]:
        fields = {MARK: cls.__name__, **{name: getattr(node, name) for name in static}}
        mark = np.frombuffer(_to_json(fields), np.uint8)
        return {MARK: mark, **{name: flax.to_state_dict(getattr(node, name)) for name in arrays}}

    def from_state(flax: ModuleType, target: Any, state: Any) -> Any:
        at = flax.current_path()
        name = name_of(state)
        if name != cls.__name__ or set(state) != {MARK, *arrays}:
            got = name or (sorted(state) if isinstance(state, Mapping) else type(state).__name__)
            raise ValueError(
                f"{at}: expected the state of {cls.__name__}, got {got}; restore into a tree of such forms"
            )
        fields = from_json(bytes(np.asarray(state[MARK])))
        del fields[MARK]
        for key in arrays:
            old = getattr(target, key)
            new = flax.from_state_dict(old, state[key], name=key)
            fields[key] = jnp.asarray(new) if isinstance(old, jax.Array) and new is not None else new
        return cls(**fields)

    def from_auxiliary(text: bytes) -> tuple[Any, ...]:
        fields = from_json(bytes(text))
        return tuple(fields[name] for name in static)

    name = f"{cls.__module__}.{cls.__name__}"
    _registered[name] += 1
    _register_with_flax(cls, to_state, from_state)
    jax.export.register_pytree_node_serialization(
        cls,
        serialized_name=name if _registered[name] == 1 else f"{name}#{_registered[name]}",
        serialize_auxdata=lambda values: _to_json(dict(zip(static, values, strict=True))),
        deserialize_auxdata=from_auxiliary,
    )
    return cls


_empty: list[type[Any]] = []
"""Classes that came to `register_empty`: every state of training has one of them in it, and no tree of forms has."""


def register_empty(cls: type[_T]) -> type[_T]:
    """Registers a node without arrays, in states of training, with `flax.serialization`: nothing is written, the
    target's is restored."""
    _empty.append(cls)
    _register_with_flax(cls, lambda flax, node: {}, lambda flax, target, state: target)
    return cls


def _register_with_flax(cls: type[Any], to_state: Callable[..., Any], from_state: Callable[..., Any]) -> None:
    """Registers a type once something imports flax, which takes as long as half of JAX.

    Args:
        cls: the type.
        to_state, from_state: as flax takes them, with the module `flax.serialization` in front.
    """

    def register(flax: ModuleType) -> None:
        flax.register_serialization_state(cls, functools.partial(to_state, flax), functools.partial(from_state, flax))

    wrapt.register_post_import_hook(register, "flax.serialization")


def is_of_state(node: object) -> bool:
    """Whether a node is one without arrays that states of training have."""
    return isinstance(node, tuple(_empty))


def name_of(state: Any) -> str | None:
    """The type of the node that a state dict was made of; None of any other value.

    Example:
        >>> import lcq, flax.serialization as fs, jax.numpy as jnp
        >>> name_of(fs.to_state_dict(lcq.KMeans(2).project(jnp.array([-1., 1., 3.]))))
        'Codes'
    """
    mark = state.get(MARK) if isinstance(state, Mapping) else None
    if getattr(mark, "dtype", None) != np.uint8 or isinstance(mark, jax.core.Tracer):
        return None
    try:
        fields = json.loads(bytes(np.asarray(mark)))
    except ValueError:
        return None
    return fields.get(MARK) if isinstance(fields, dict) else None


def _to_json(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, default=dataclasses.asdict).encode()


def _tuples(value: Any) -> Any:
    """JSON's lists as tuples."""
    if isinstance(value, dict):
        return {key: _tuples(part) for key, part in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
