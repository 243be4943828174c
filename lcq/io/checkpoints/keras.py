"""Checkpoints in .weights.h5 files of Keras 3.

    layers/dense/vars/0      kernel
    layers/dense/vars/1      bias
    layers/dense_1/vars/0    ..

Names are places: variables are numbered in the order in which a layer made them, and layers of one class in the order
of the net. The file does not say what they are.
"""

import importlib.util
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lcq.forms.dtypes import native
from lcq.io.checkpoints.base import CHECKPOINT_FORMATS, Checkpoint, CheckpointFormat, nested
from lcq.io.container import DTYPES
from lcq.io.facts import Facts


@CHECKPOINT_FORMATS.register("keras")
class Keras(CheckpointFormat):
    """A .weights.h5 file: arrays in groups of HDF5; needs h5py."""

    suffix = ".weights.h5"
    only_read = True

    @classmethod
    def facts(cls) -> Sequence[Facts]:
        facts = Facts(
            "`.weights.h5` of Keras 3 (needs h5py)",
            "by place, `layers/dense/vars/0`, with a warning",
            "",
            "links and external data; a `.keras` archive: unzip it",
        )
        return (facts,)

    def recognises(self, path: Path) -> bool:
        return path.name.endswith(self.suffix)

    def read(self, path: Path) -> Checkpoint:
        if importlib.util.find_spec("h5py") is None:
            raise ValueError(
                f"{path}: Keras's file needs h5py; pip install h5py, or export the weights as .safetensors"
            )
        import h5py

        arrays: dict[str, np.ndarray] = {}
        try:
            with h5py.File(path, "r", locking=False) as file:
                _gather(file, "", arrays, h5py)
        except (OSError, RuntimeError, KeyError, MemoryError) as error:
            raise ValueError(f"{path}: not an HDF5 file, or damaged: {error}; get it again") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if any(name.split("/")[-2:-1] == ["vars"] for name in arrays):
            warnings.warn(
                f"{path}: Keras names weights by their order, vars/0 the first that a layer made, mostly its kernel; "
                "compare the shapes with those of the net",
                stacklevel=4,
            )
        return Checkpoint(nested(path, arrays), {})


def _gather(group: Any, above: str, arrays: dict[str, np.ndarray], h5py: Any) -> None:
    """Arrays of a group and the groups in it, in order; links, which may lead to other files, are refused."""
    for name in group:
        place = f"{above}{name}"
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise ValueError(f"{place[:200]}: expected arrays and groups, got a link; copy what it leads to")
        here = group[name]
        if isinstance(here, h5py.Group):
            if place.count("/") > 62:
                raise ValueError(f"{place[:200]}: expected groups at most 63 deep")
            _gather(here, f"{place}/", arrays, h5py)
        elif not isinstance(here, h5py.Dataset) or (_dtype(here) not in DTYPES.values()):
            raise ValueError(f"{place[:200]}: expected numbers, got {getattr(here, 'dtype', type(here).__name__)}")
        elif here.external or here.is_virtual:
            raise ValueError(f"{place[:200]}: expected numbers in this file, got some in another")
        else:
            arrays[place] = native(np.asarray(here)).view(_dtype(here))


def _dtype(data: Any) -> np.dtype:
    """What the numbers are in this machine's order; HDF5 has no bfloat16, of which Keras keeps the name beside them."""
    if data.dtype == "V2" and data.attrs.get("dtype") == "bfloat16":
        return np.dtype(jnp.bfloat16)
    return data.dtype.newbyteorder("=")
