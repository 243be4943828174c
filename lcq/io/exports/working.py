"""Codes in the working layout, in numpy or declared: unpacked once, and taken apart into layers."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from lcq.forms import Codes, bitpack

Array = np.ndarray | jax.ShapeDtypeStruct
"""Of a leaf, or what it will be."""


def declared_codes(form: Codes, stacked: int) -> Codes:
    """A form with shape structs for arrays, without its stacked axes."""
    small = np.dtype(np.uint8 if form.size_of_table <= 256 else np.uint16)
    scale, zero = form.scale, form.zero
    if form.blocks is not None:  # words of steps, see `lcq.forms.steps`
        scale = zero = jax.ShapeDtypeStruct(form.blocks, np.dtype(np.float32))
    elif zero is not None and zero.dtype == np.uint32:
        zero = jax.ShapeDtypeStruct(form.scale.shape, small)
    parts = (jax.ShapeDtypeStruct(form.shape, small), form.levels, scale, zero)
    codes, levels, scale, zero = (_below(a, stacked) for a in parts)
    how: Any = {"scale_bits": form.scale_bits, "along": form.along, "dtype": form.dtype}
    return Codes(codes=codes, levels=levels, scale=scale, zero=zero, values=form.values, **how)


def _below(array: Array | jax.Array | None, stacked: int) -> jax.ShapeDtypeStruct | None:
    return None if array is None else jax.ShapeDtypeStruct(array.shape[stacked:], array.dtype)


def on_host(form: Codes) -> Codes:
    """A form in the working layout, in numpy."""
    host = jax.device_get(form if form.scale_bits is None else form.plain())
    host = dataclasses.replace(host, scale_bits=form.scale_bits, along=form.along)
    if host.packed is None:
        return host
    bits = bitpack.width(host.size_of_table)
    codes = bitpack.unpack_host(np.asarray(host.codes), bits, math.prod(host.packed)).reshape(host.packed)
    zero = host.zero
    if zero is not None and zero.dtype == np.uint32:
        zero = bitpack.unpack_host(zero, bits, math.prod(host.scale.shape)).reshape(host.scale.shape)
    return dataclasses.replace(host, codes=codes, zero=zero, packed=None)


def layer_of(form: Codes, index: tuple[int, ...]) -> Codes:
    """One layer of a stacked form in the working layout, in numpy."""
    parts = {"codes": form.codes, "levels": form.levels, "scale": form.scale, "zero": form.zero}
    made = {}
    for name, array in parts.items():
        for i in index if array is not None else ():
            array = array[i if array.shape[0] > 1 else 0]
        made[name] = array
    return dataclasses.replace(form, **made)
