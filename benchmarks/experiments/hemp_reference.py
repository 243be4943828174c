"""LeNet-5 from random weights, the float net from which `hemp` starts.

LCQ_DATA=folder python -m benchmarks.experiments.hemp_reference        artifacts/lenet5_reference.npz
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict

from benchmarks.experiments.hemp_nets import BATCH, NETS, REFERENCE, LeNet5, judge, train
from benchmarks.harness.artifacts import ARTIFACTS
from benchmarks.harness.record import record


def reference(epochs: int) -> None:
    """LeNet-5 from random weights."""
    net, log = NETS["lenet5"], {"curve": [], "seconds": 0.0}
    images = net.images()
    rate = optax.cosine_decay_schedule(0.05, epochs * (len(images.train[0]) // BATCH))
    params = jax.jit(LeNet5().init)(jax.random.key(0), jnp.zeros((1, 28, 28)))["params"]
    tx = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(rate, 0.9, nesterov=True))

    def each(now: Any) -> None:
        print(judge(net, {"params": now[0]}, images.held_back), flush=True)

    params, *_ = train(net, tx, (params, {}, tx.init(params)), images, log, epochs, 0, each)
    np.savez(REFERENCE, **{"/".join(path): np.asarray(a) for path, a in flatten_dict(params).items()})
    row: dict[str, Any] = {"float32_bytes": 4 * sum(a.size for a in jax.tree.leaves(params)), "epochs": epochs}
    for name, some in images._asdict().items():
        row[f"{name}_loss"], row[f"{name}_error"] = judge(net, {"params": params}, some)
    print(row)
    record("hemp_lenet5_reference", [row], seeds=[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=15)
    ARTIFACTS.mkdir(exist_ok=True)
    reference(parser.parse_args().epochs)


if __name__ == "__main__":
    main()
