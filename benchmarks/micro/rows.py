"""How fast few and many rows are multiplied with codes of every form, against float32 and onnxruntime.

    python -m benchmarks.micro.rows         results/rows.json, rows_avx2.json, 3 minutes; pip install onnx onnxruntime
    ... --cores 1 2 --widths 256 512                    what is measured; each pair in a process of its own

x [m, 4096] by W [4096, 4096] of random codes, prepacked once, measured as in `benchmarks.micro.kernels`: `times` is the
time of float32's `jnp.dot` over that of another. Where the compiled kernels are installed (`pip install ./native`),
every form that they multiply has a second line, "in XLA", for what is taken without them. Of onnxruntime it is
MatMulNBits, 4 bits in groups of 32, with activations in float32 (accuracy level 0) and in 8 bits (level 4). Processors
without AVX-512 have results of their own.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness.each_width import measure
from benchmarks.harness.markdown import grid
from benchmarks.harness.record import stored
from benchmarks.micro.kernels import row, times

SIZE, GROUP, LONG = 4096, 32, 128
LEAF, CHANNEL, GROUPS, LONG_GROUPS = (1, 1), (1, SIZE), (SIZE // GROUP, SIZE), (SIZE // LONG, SIZE)
EVEN = {  # levels, blocks, zeros: with equal steps
    "1 bit, learned": (2, LEAF, False),
    "ternary": (3, LEAF, False),
    "2 bits, groups of 32": (4, GROUPS, False),
    "3 bits, groups of 32": (8, GROUPS, False),
    "4 bits, channel": (16, CHANNEL, False),
    "4 bits, groups of 32": (16, GROUPS, False),
    "4 bits, groups of 32, zeros": (16, GROUPS, True),
    "4 bits, groups of 128": (16, LONG_GROUPS, False),
    "8 bits, channel": (256, CHANNEL, False),
    "8 bits, groups of 32": (256, GROUPS, False),
}
BOOKS = {
    "codebook of 4, leaf": (4, LEAF),
    "codebook of 8, channel": (8, CHANNEL),
    "codebook of 16, leaf": (16, LEAF),
    "codebook of 16, channel": (16, CHANNEL),
    "codebook of 16, groups of 128": (16, LONG_GROUPS),
    "codebook of 32, leaf": (32, LEAF),
    "codebook of 256, leaf": (256, LEAF),
}
PEERS = {"onnxruntime, 4 bits, groups of 32": 0, "the same, activations in 8 bits": 4}
"""Accuracy levels of MatMulNBits."""


def forms_of() -> dict[str, Any]:
    """Random codes; scales of both signs, in 16 bits where they are many."""
    import jax.numpy as jnp
    import numpy as np

    import lcq

    rng, made = np.random.default_rng(0), {}

    def codes(count: int) -> Any:
        return jnp.asarray(rng.integers(0, count, (SIZE, SIZE), np.uint8))

    for name, (count, blocks, zeros) in EVEN.items():
        scale = jnp.asarray(rng.uniform(-1, 1, blocks), jnp.float16 if blocks == GROUPS else jnp.float32)
        zero = jnp.asarray(rng.integers(0, count, blocks, np.uint8)) if zeros else None
        values = tuple(float(level if zeros else level - count // 2) for level in range(count))
        made[name] = lcq.forms.Codes(codes(count), values=values, scale=scale, zero=zero)
    for name, (count, blocks) in BOOKS.items():
        levels = np.sort(rng.normal(size=(*blocks, count)).astype(np.float32), -1)
        made[name] = lcq.forms.Codes(codes(count), levels=jnp.asarray(levels))
    made["sum of two codebooks of 4"] = lcq.forms.Sum((made["codebook of 4, leaf"],) * 2)
    return made


def peers(cores: int, x: Any) -> dict[str, Callable[[], Any]]:
    """Products of onnxruntime."""
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    rng, made = np.random.default_rng(0), {}
    packed = numpy_helper.from_array(rng.integers(0, 256, (SIZE, SIZE // GROUP, GROUP // 2), np.uint8), "b")
    scales = numpy_helper.from_array(rng.uniform(0.5, 1, SIZE * SIZE // GROUP).astype(np.float32), "s")
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [len(x), SIZE]) for name in "ay"]
    for name, level in PEERS.items():
        how = {"K": SIZE, "N": SIZE, "bits": 4, "block_size": GROUP, "accuracy_level": level, "domain": "com.microsoft"}
        node = helper.make_node("MatMulNBits", ["a", "b", "s"], ["y"], **how)
        graph = helper.make_graph([node], "product", ends[:1], ends[1:], [packed, scales])
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = cores
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
        made[name] = lambda session=session: session.run(None, {"a": np.asarray(x)})[0]
    return made


def rows() -> list[dict[str, Any]]:
    import jax
    import jax.numpy as jnp
    import numpy as np
    import onnxruntime

    from lcq.kernels.api import matmul, way

    forms = {name: form.prepack() for name, form in forms_of().items()}
    w = jnp.asarray(np.random.default_rng(1).normal(size=(SIZE, SIZE)), jnp.float32)
    dot, door, found = jax.jit(jnp.dot), jax.jit(matmul, static_argnames="kernel"), []
    for m in (1, 64):
        x = jnp.asarray(np.random.default_rng(2).normal(size=(m, SIZE)), jnp.float32)
        contestants: dict[str, Callable[[], Any]] = {"float32": lambda x=x: dot(x, w)}
        kernels = {name: way(form, m) for name, form in forms.items()}
        for name, form in forms.items():
            contestants[name] = lambda x=x, form=form: door(x, form)
            if kernels[name] == "native":
                contestants[f"{name}, in XLA"] = lambda x=x, form=form: door(x, form, kernel="codes")
        contestants |= peers(len(os.sched_getaffinity(0)), x)
        spent = times(contestants, 15 if m == 1 else 7, m == 1)
        facts = {"cold": m == 1, "kernels": kernels, "onnxruntime": onnxruntime.__version__}
        found.append(row("rows", (m, SIZE, SIZE), spent, **facts))
    return found


def table(result: str = "rows") -> str:
    """How many times faster than float32, at 1 row and at 64."""
    runs = list(dict.fromkeys((row["cores"], row["vector_bits"]) for row in stored(result)))
    lines: dict[str, dict[Any, str]] = {}
    for found in stored(result):
        for name, gain in found["times"].items():
            cell = f"{gain:.{1 + (gain < 2)}f}"
            lines.setdefault(name, {}).setdefault((found["cores"], found["vector_bits"]), []).append(cell)
    head = ["times faster than float32, 1 row; 64 rows", *(f"{c} core{'s' * (c > 1)}, {v} bits" for c, v in runs)]
    return grid(head, [[name, *("; ".join(cells[run]) for run in runs)] for name, cells in lines.items()])


if __name__ == "__main__":
    wide = "avx512f" in Path("/proc/cpuinfo").read_text()
    measure("rows", __doc__, rows, "rows" if wide else "rows_avx2")
