"""What compilers say about the Pallas kernels on machines that are not there. Predictions: nothing is run.

    JAX_PLATFORMS=cpu python -m benchmarks.checks.aot_report        results/aot_report.json

Needs the extra `aot`. For K = N = 4096, every kernel, target and number of rows: operations of the dense product, bytes
of arguments and results, temporary bytes, and the time in which the device's memory could pass the bytes once, with the
packed and with a dense bfloat16 weight. For TPU, from the compiler's dumps: vector memory of the kernel, and bundles of
its schedule times steps of its grid on one core, as cycles without any waiting for memory; and the bundles of what XLA
does around the kernel. For GPU: shared memory, and how often the code holds the instructions that the kernel is for.
"""

import collections
import functools
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

FOLDER = tempfile.TemporaryDirectory()
DUMPS = Path(FOLDER.name)
# Read by libtpu when it is loaded.
os.environ |= {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={DUMPS} --xla_jf_dump_llo_text=true",
}

import jax  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.experimental.pallas import tpu as pltpu  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

from benchmarks.harness.record import record  # noqa: E402
from lcq.kernels import pallas_gpu, pallas_tpu  # noqa: E402

K = N = 4096
ROWS = (1, 16, 256)
CONFIGURATIONS = Path(__file__).parents[1] / "tests" / "aot" / "targets"
TPU = {
    "v5e": ("v5e:2x2", pltpu.ChipVersion.TPU_V5E, 1),
    "v6e": ("v6e:2x2", pltpu.ChipVersion.TPU_V6E, 1),
    "v5p": ("v5p:2x2x1", pltpu.ChipVersion.TPU_V5P, 2),
}
GPU = {"sm_80": "a100", "sm_90a": "h100"}
KERNELS = {
    "xnor popcount": ("uint32", K // 32, lambda kernels: functools.partial(kernels.xnor, k=K, unit="popcount")),
    "xnor matrix": ("uint32", K // 32, lambda kernels: functools.partial(kernels.xnor, k=K, unit="matrix")),
    "bit_product bfloat16": ("bfloat16", K, lambda kernels: kernels.bit_product),
    "bit_product float32": ("float32", K, lambda kernels: kernels.bit_product),
}


def device_of(target: str) -> tuple[Any, float]:
    """A device, and bytes per second of its memory."""
    if target in TPU:
        name, chip, cores = TPU[target]
        info = pltpu.get_tpu_info_for_chip(chip, cores)
        device = topologies.get_topology_desc(platform="tpu", topology_name=name).devices[0]
        return device, info.mem_bw_bytes_per_second * cores
    text = (CONFIGURATIONS / f"{GPU[target]}.txtpb").read_text()
    described = topologies.get_topology_desc(platform="cuda", topology_name="", target_config=text, topology="1x1x1")
    bandwidth = re.search(r"memory_bandwidth: (\d+)", text)
    assert bandwidth
    return described.devices[0], float(bandwidth[1])


def compiled(target: str, device: Any, kernel: str, m: int) -> Any:
    """The executable of a kernel; its dumps are all that is in DUMPS."""
    for path in DUMPS.iterdir():
        path.unlink()
    dtype, columns, choose = KERNELS[kernel]
    place = NamedSharding(Mesh(np.array([device]), ("device",)), PartitionSpec())
    left = jax.ShapeDtypeStruct((m, columns), dtype, sharding=place)
    words = jax.ShapeDtypeStruct((K // 32, N), "uint32", sharding=place)
    f = choose(pallas_tpu if target in TPU else pallas_gpu)
    lowered = jax.jit(f, out_shardings=place).trace(left, words)
    if target in TPU:
        return lowered.lower(lowering_platforms=("tpu",)).compile()
    return lowered.lower(lowering_platforms=("cuda",)).compile(compiler_options={"xla_dump_to": str(DUMPS)})


def tpu_schedule() -> dict[str, Any]:
    """Of the dumps: vector memory, bundles, steps and cycles of the kernel, bundles around it."""
    found: dict[str, Any] = {"bundles_around": 0}
    for path in DUMPS.glob("*schedule-analysis_final_bundles.txt"):
        text, name = path.read_text(), re.sub(r"-\d+-schedule-analysis.*", "", path.name)
        total = re.search(r"total scheduled bundles: +(\d+)", text)
        if total is None or "[opcode]" not in text:
            continue
        bundles = int(total[1])
        if "scheduled bundles (100.00%): custom-call" not in text:
            found["bundles_around"] += bundles
            continue
        final = next(p for p in DUMPS.iterdir() if re.fullmatch(re.escape(name) + r"-\d+-final_bundles.txt", p.name))
        delayed = next(p for p in DUMPS.iterdir() if re.fullmatch(re.escape(name) + r"-\d+-post-delay.*", p.name))
        grid = re.search(r"iteration_bounds: \(([\d, ]+)\)", final.read_text())
        assert grid
        steps = int(np.prod([int(n) for n in grid[1].split(",")]))
        loops = len(re.findall(r" LB: ", final.read_text()))
        sizes = re.findall(r"space=vmem, size = (0x[0-9a-f]+)", delayed.read_text())
        found |= {
            "vmem_bytes": sum(int(size, 16) for size in sizes),
            "bundles": bundles,
            "steps": steps,
            "cycles": bundles * steps if loops == 1 else None,  # a loop inside a step runs more often than once
        }
    return found


def gpu_code() -> dict[str, Any]:
    """Of the dumps: shared memory, threads, and how often the instructions of note are in the code."""
    text = "".join(path.read_text() for path in DUMPS.glob("*thunk_sequence.txt"))
    launch = re.search(r"grid: \[([\d, ]+)\] threads: \[([\d, ]+)\] +shared_memory: (\d+)", text)
    assert launch
    code = "".join(path.read_text() for path in DUMPS.glob("*.ptx"))
    counts = collections.Counter(re.findall(r"\b(popc|mma\.sync|wgmma\.mma_async)\b", code))
    return {"shared_bytes": int(launch[3]), "grid": launch[1], "threads": launch[2], "instructions": dict(counts)}


def main() -> None:
    if os.environ.get("JAX_PLATFORMS") != "cpu":
        sys.exit("expected JAX_PLATFORMS=cpu: jax must not look for the machines that are compiled for")
    rows = []
    for target in (*TPU, *GPU):
        device, bandwidth = device_of(target)
        for kernel, (dtype, _, _) in KERNELS.items():
            for m in ROWS:
                executable = compiled(target, device, kernel, m)
                memory = executable.memory_analysis()
                moved = memory.argument_size_in_bytes + memory.output_size_in_bytes
                dense = 2 * K * N + (2 if dtype == "uint32" else np.dtype(dtype).itemsize) * m * K + 4 * m * N
                row = {
                    "prediction": True,
                    "target": target,
                    "kernel": kernel,
                    "m": m,
                    "k": K,
                    "n": N,
                    "flops": 2 * m * K * N,
                    "bytes": moved,
                    "temporary_bytes": memory.temp_size_in_bytes,
                    "bytes_floor_microseconds": round(1e6 * moved / bandwidth, 2),
                    "dense_bytes_floor_microseconds": round(1e6 * dense / bandwidth, 2),
                    **(tpu_schedule() if target in TPU else gpu_code()),
                }
                rows.append(row)
                print("predicted:", {key: value for key, value in row.items() if key != "prediction"}, flush=True)
    record("aot_report", rows, prediction="compile results and arithmetic; nothing was run on these machines")


if __name__ == "__main__":
    main()
