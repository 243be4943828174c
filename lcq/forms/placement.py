"""Forms on the devices of a mesh, each process putting there what is its own."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from lcq.forms.base import Form, is_form
from lcq.forms.meshes import divides


def place(value: Any, onto: Sharding) -> Any:
    """An array, or a form in the working layout, whose parts lie as `onto` cuts the leaf.

    What has the leaf's shape is cut as the leaf is. Tables with entries for blocks are cut along the axes whose number
    of blocks divides, for then the blocks of a device are those of its part of the leaf. The rest is on all devices.

    Args:
        value: an array, or a form in either layout, in this process's memory; the same in all processes.
        onto: how the leaf lies: on a mesh, or on one device.

    Raises:
        ValueError: another kind of sharding, or one that cannot cut the leaf.

    Example:
        >>> import lcq, jax.numpy as jnp
        >>> mesh = jax.make_mesh((1,), ("x",))
        >>> form = lcq.Uniform(4, per=2).project(jnp.arange(8.0).reshape(4, 2)).pack()
        >>> placed = place(form, NamedSharding(mesh, PartitionSpec("x")))
        >>> placed.codes.shape, tuple(placed.scale.sharding.spec)[:1]
        ((4, 2), ('x',))
    """
    if not isinstance(onto, NamedSharding | SingleDeviceSharding):
        raise ValueError(f"expected a NamedSharding, or that of one device, got {onto}; name the axes of a mesh")
    if not is_form(value):
        return _put(value, onto)
    form = value.unpack()
    fields = [field for field in dataclasses.fields(form) if not field.metadata.get("static")]
    return dataclasses.replace(
        form, **{field.name: _placed(form, field, getattr(form, field.name), onto) for field in fields}
    )


def _placed(form: Form, field: dataclasses.Field[Any], value: Any, onto: Sharding) -> Any:
    if isinstance(value, tuple):
        return tuple(_placed(form, field, part, onto) for part in value)
    if value is None or is_form(value):
        return None if value is None else place(value, onto)
    if not isinstance(onto, NamedSharding) or (field.metadata.get("leafwise") and value.shape == form.shape):
        return _put(value, onto)
    spec = () if field.metadata.get("own") else onto.spec[: value.ndim]
    names = [name if divides(name, n, onto.mesh) else None for name, n in zip(spec, value.shape, strict=False)]
    return _put(value, NamedSharding(onto.mesh, PartitionSpec(*names)))


def _put(value: Any, onto: Sharding) -> jax.Array:
    host = np.asarray(value)
    return jax.make_array_from_callback(host.shape, onto, lambda place: host[place])
