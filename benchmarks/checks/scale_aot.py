"""What a training step of `lc` takes on 64 v5e chips that are not there: a net of 6.74e9 weights, sharded like FSDP.

    JAX_PLATFORMS=cpu python -m benchmarks.checks.scale_aot [SCHEME ..]        results/scale_aot.json

Needs libtpu, which is in the extra `aot`. Leaves have the shapes of LLaMA-7B, in bfloat16, those of its 32
layers stacked, each cut along one axis over 64 devices. AdamW; the loss is a stand-in, half the squared distance to a
constant, so that what is counted are the optimizer and lcq. Compiled, never run: bytes of arguments and of temporaries
on one chip of a step without and with a C step, the largest array that is gathered, and how much of the state that a
jitted `init` makes without being told where lies whole on every chip.
"""

import dataclasses
import os
import re
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ |= {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_ACCELERATOR_TYPE": "v5litepod-64",
    "TPU_WORKER_HOSTNAMES": "localhost",
}

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lcq
from benchmarks.harness.record import record, stored

CHIPS = 64
LAYERS, WIDTH, HIDDEN, WORDS = 32, 4096, 11008, 32000
SHAPES = {
    "embed": (WORDS, WIDTH),
    "head": (WIDTH, WORDS),
    "layers": {
        **{name: (LAYERS, WIDTH, WIDTH) for name in ("q", "k", "v", "o")},
        **{name: (LAYERS, WIDTH, HIDDEN) for name in ("gate", "up")},
        "down": (LAYERS, HIDDEN, WIDTH),
    },
}
MATRICES = ".*"

SHORT = (("multipliers_dtype", "bfloat16"), ("narrow_codes", True))


@dataclasses.dataclass(frozen=True)
class Case:
    """A scheme, along which axis from the end leaves are cut, and how the state is kept."""

    scheme: lcq.schemes.Scheme
    axis: int = -1
    joint: bool = False
    settings: tuple[tuple[str, Any], ...] = SHORT


CASES = {
    "KMeans(16, channel)": Case(lcq.KMeans(16, per="channel")),
    "KMeans(16, 32)": Case(lcq.KMeans(16, per=32)),
    "Uniform(4, 32)": Case(lcq.Uniform(4, per=32)),
    "Ternary": Case(lcq.Ternary()),
    "Prune, joint": Case(lcq.Prune(fraction=0.1), joint=True),
    "Additive": Case(lcq.Additive(lcq.Uniform(4, per=32), lcq.Prune(fraction=0.01))),
}


def mesh() -> Mesh:
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:8x8").devices
    return Mesh(np.array(devices), ("fsdp",), axis_types=(AxisType.Auto,))


def parameters(place: Mesh, axis: int) -> Any:
    def leaf(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        spec: list[Any] = [None] * len(shape)
        spec[axis] = "fsdp"
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(place, P(*spec)))

    return jax.tree.map(leaf, SHAPES, is_leaf=lambda node: isinstance(node, tuple))


def loss(params: Any) -> jax.Array:
    return sum(0.5 * jnp.sum((w.astype(jnp.float32) - 0.01) ** 2) for w in jax.tree.leaves(params))


def training_step(tx: optax.GradientTransformation) -> Callable[..., Any]:
    def step(params: Any, state: Any) -> Any:
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


def compiled(function: jax.stages.Wrapped, *args: Any) -> Any:
    here = jax.tree.leaves(args)[0].sharding.mesh.abstract_mesh
    with jax.sharding.use_abstract_mesh(here):  # as jax.set_mesh, which would run on devices that are not there
        traced = function.trace(*args)
    return traced.lower(lowering_platforms=("tpu",)).compile()


def gathered(text: str) -> int:
    """Bytes of the largest array that an all-gather makes."""
    sizes = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "u16": 2, "s16": 2, "f32": 4, "s32": 4, "u32": 4, "u4": 1, "u2": 1}
    most = 0
    for line in text.splitlines():
        if re.search(r" = .* all-gather(-start)?\(", line):
            for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", line.split(" all-gather")[0]):
                most = max(most, int(np.prod([int(n) for n in dims.split(",") if n])) * sizes.get(dtype, 4))
    return most


def placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, shardings)


def whole_bytes(state: Any) -> int:
    """Bytes of arrays that lie whole on every chip."""
    leaves = [leaf for leaf in jax.tree.leaves(state) if leaf.sharding.is_fully_replicated]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def memory(program: Any) -> tuple[int, int]:
    found = program.memory_analysis()
    return found.argument_size_in_bytes, found.temp_size_in_bytes


def measured(name: str, case: Case | None, place: Mesh) -> dict[str, Any]:
    start, params = time.time(), parameters(place, -1 if case is None else case.axis)
    bare = optax.adamw(1e-4)
    row: dict[str, Any] = {"prediction": True, "name": name, "chips": CHIPS}

    def wrapped(every: int | None) -> Any:
        if case is None:
            return bare
        rules = [
            lcq.Rule("layers/.*", case.scheme, stacked=0 if case.joint else 1, joint=case.joint),
            lcq.Rule(MATRICES, case.scheme),
        ]
        if case.joint:
            rules = [lcq.Rule(MATRICES, case.scheme, joint=True)]
        mu = lcq.geometric(1e-3, 1.1, steps=40)
        return lcq.lc(bare, rules, mu=mu, every=every, **dict(case.settings))

    if case is None:
        whole = NamedSharding(place, P())
        where = jax.tree.map(lambda w: w.sharding, params)
        shapes = jax.eval_shape(bare.init, params)
        state = placed(
            shapes, optax.tree.map_params(bare, lambda _, s: s, shapes, where, transform_non_params=lambda _: whole)
        )
    else:
        first = compiled(jax.jit(wrapped(None).init), params)
        state = placed(jax.eval_shape(wrapped(None).init, params), first.output_shardings)
        row["init_temporary_bytes"] = memory(first)[1]
        row["init_gathered_bytes"] = gathered(first.as_text())
    row["whole_bytes_of_state"] = whole_bytes(state)
    for kind, every in (("step", None), ("c_step", 5)):
        if case is None and every:
            continue
        program = compiled(training_step(wrapped(every)), params, state)
        row["argument_bytes"], row[f"{kind}_temporary_bytes"] = memory(program)
        row[f"{kind}_gathered_bytes"] = gathered(program.as_text())
    return row | {"weights": sum(leaf.size for leaf in jax.tree.leaves(params)), "seconds": round(time.time() - start)}


def main() -> None:
    if os.environ.get("JAX_PLATFORMS") != "cpu":
        sys.exit("expected JAX_PLATFORMS=cpu: jax must not look for the machines that are compiled for")
    place, chosen = mesh(), sys.argv[1:]
    rows = {row["name"]: row for row in stored("scale_aot")}
    for name, case in {"bare": None, **CASES}.items():
        if not chosen or name in chosen:
            rows[name] = measured(name, case, place)
            print("predicted:", rows[name], flush=True)
            found = [rows[name] for name in ("bare", *CASES) if name in rows]
            record("scale_aot", found, prediction="compiled, not run")


if __name__ == "__main__":
    main()
