"""Compilers for machines that are not there: describes the machines, and skips where a compiler is not installed.

libtpu reads the variables when it is first loaded, jax reads JAX_PLATFORMS when it is imported. Where jax may use real
devices, nothing is set and these tests are skipped: run .ci/aot, or set JAX_PLATFORMS=cpu.
"""

import functools
import importlib.util
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

ABSENT_ONLY = os.environ.get("JAX_PLATFORMS") == "cpu"

if ABSENT_ONLY:
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_LOG_DIR": "disabled",
        "TPU_MIN_LOG_LEVEL": "3",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }.items():
        os.environ.setdefault(name, value)

TPU = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v5p": "v5p:2x2x1"}
GPU = {"sm_80": "a100", "sm_90a": "h100"}


@functools.cache
def on_one_device(target):
    """A sharding over one device of the target."""
    if target in TPU:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=TPU[target]).devices
    else:
        config = (Path(__file__).parent / "targets" / f"{GPU[target]}.txtpb").read_text()
        devices = topologies.get_topology_desc(
            platform="cuda", topology_name="", target_config=config, topology="1x1x1"
        ).devices
    return NamedSharding(Mesh(np.array(devices[:1]), ("device",)), PartitionSpec())


@pytest.fixture
def compiled():
    """compiled(target, f, *shapes, **options): f compiled for the target; skips if its compiler is absent."""

    def compile_for(target, f, *shapes, **options):
        platform, module = ("tpu", "libtpu") if target in TPU else ("cuda", "jax_cuda13_plugin")
        if not ABSENT_ONLY:
            pytest.skip("compiles for absent machines only: set JAX_PLATFORMS=cpu, or run .ci/aot")
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install '.[aot]', or run .ci/aot")
        place = on_one_device(target)
        arrays = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for dtype, *shape in shapes]
        traced = jax.jit(f, out_shardings=place).trace(*arrays)
        return traced.lower(lowering_platforms=(platform,)).compile(compiler_options=options)

    return compile_for
