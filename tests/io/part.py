"""What each of several processes does in `test_processes`: python -m tests.io.part ADDRESS RANK COUNT FOLDER AXES.

It ends with the process that started it. What all of them found goes to FOLDER/RANK.json.
"""

import ctypes
import json
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lcq
from lcq.io import writing

RULES = [
    lcq.Rule("layers/0/w", lcq.KMeans(4)),
    lcq.Rule("layers/1/w", lcq.Uniform(4, per=8)),
    lcq.Rule("head", lcq.Prune(fraction=0.25)),
    lcq.Rule("tail", lcq.LowRank(rank=3)),
    lcq.Rule("both/.*", lcq.Ternary(), joint=True),
]
SPECS = {
    "layers": [{"w": P("x", None), "b": P()}, {"w": P(None, "x"), "b": P("x")}],
    "head": P("x"),
    "tail": P(None, "x"),
    "both": {"a": P("x"), "b": P()},
}


def weights():
    """Numbers, the same in all processes."""
    rng = np.random.default_rng(0)
    shapes = {
        "layers": [{"w": (16, 24), "b": (24,)}, {"w": (24, 16), "b": (16,)}],
        "head": (16, 4),
        "tail": (8, 16),
        "both": {"a": (8, 8), "b": (5,)},
    }
    return jax.tree.map(
        lambda shape: rng.normal(size=shape).astype(np.float32), shapes, is_leaf=lambda n: isinstance(n, tuple)
    )


def mesh_of(kind, axis="x"):
    return jax.make_mesh((jax.device_count(),), (axis,), axis_types=(kind,))


def shardings(mesh):
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS, is_leaf=lambda n: isinstance(n, P))


def spread(tree, places):
    return jax.tree.map(lambda w, onto: jax.make_array_from_callback(w.shape, onto, lambda i: w[i]), tree, places)


def rules(count):
    """All for two processes, and for more the first, as each of them compiles its programs."""
    return RULES if count == 2 else RULES[:3]


def trained(params, rules):
    """Parameters and state after a short run of LC."""
    tx = lcq.lc(optax.sgd(0.1), rules, mu=lcq.geometric(0.1, 1.5, steps=9), every=2)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.tree.map(lambda w: 0.1 * w, params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(5):
        params, state = step(params, state)
    return params, state


def noted(names):
    return lambda number, total, name: names.append(name)


def far(one, other):
    """The largest difference of two nets."""
    apart = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), lcq.decompress(one), lcq.decompress(other))
    return jnp.stack(jax.tree.leaves(apart)).max()


def refused(call):
    try:
        call()
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def main():
    address, rank, count, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, num_processes=count, process_id=rank, initialization_timeout=60)
    mesh, found = mesh_of(AxisType[sys.argv[5]]), {}
    if sys.argv[5] == "Explicit":
        jax.set_mesh(mesh)
    params, state = trained(spread(weights(), shardings(mesh)), rules(count))
    forms = lcq.extract(state, params)
    streams = []
    sizes = [
        lcq.save(folder / "net.lcq", forms),
        lcq.save(folder / "set.lcq", forms, max_shard_bytes=600, progress=noted(streams)),
    ]
    table = lcq.table(forms, params)
    back = lcq.load(folder / "set.lcq", like=params, shardings=shardings(mesh))
    assert jax.jit(far)(back, forms) < 1e-5
    codes = back["layers"][0]["w"].codes.sharding
    assert codes.is_equivalent_to(NamedSharding(mesh, P("x", None)), 2)
    found |= {
        "sizes": sizes,
        "streams": streams,
        "total": [table.total.bits, table.total.coded, table.total.error],
        "c_steps": int(lcq.metrics(state)["c_steps"]),
    }
    back = lcq.load(folder / "of-one.lcq", shardings=NamedSharding(mesh, P()))
    found["of one"] = float(jnp.sum(back["layers"][0]["w"].dense()))

    scheme = lcq.KMeans(4 if rank != 1 else 5)
    other = [lcq.Rule("layers/0/w", scheme), *RULES[1:]]
    found["rules"] = refused(lambda: lcq.compress(params, other))
    found["trees"] = refused(lambda: lcq.save(folder / "bad.lcq", {"w": params["head"], "n": np.ones(rank + 1)}))
    data = [np.ones((2, 16), np.float32)]
    found["quantize"] = refused(lambda: lcq.quantize(lambda p, x: x @ p["head"], params, data, RULES[2:3]))
    there = {"w": back["layers"][0]["b"], "c": lcq.forms.Cast(back["layers"][0]["b"])}  # every process has all of it
    found["alone"] = lcq.save(folder / f"{rank}.lcq", there)
    real = writing.ShardWriter.put
    if rank == 1:
        writing.ShardWriter.put = lambda self, *args: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    try:
        lcq.save(folder / "set.lcq", {"w": params, "more": np.ones(100)}, max_shard_bytes=600)
    except (ValueError, OSError) as error:
        found["full"] = str(error)
    writing.ShardWriter.put = real
    (folder / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
