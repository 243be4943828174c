"""Few calibration rows: errors on new data of a layer, quantized by each method, over those of plain `lcq.compress`.

    python -m benchmarks.experiments.gpfq_rows                    all: results/gpfq_rows.json
    ... --inputs 128 --kinds mixed --rows 32 512      some, printed and not recorded

One layer, 64 neurons, inputs of several kinds: mixed (x A, A near the identity), apart (independent), relu (of mixed
ones, with a mean), low (N/8 directions and noise), tokens (8 rows that share a part, inputs of very different size).
"ratio" is ||X w - Y q||^2 on 4,000 new rows over that of `lcq.compress`, "plain" the same with shrink=0, as the papers
have it; "held_out" and "error" are those of the record, over the error of `lcq.compress` on new data, too.
"""

import argparse
import itertools

import jax.numpy as jnp
import numpy as np

import lcq
from benchmarks.harness.markdown import grid
from benchmarks.harness.record import record, stored

METHODS = ("rtn", "gpfq", "gptq", "qronos", "descent")
NEURONS, NEW = 64, 4000
GRID = [
    *itertools.product((128,), (8, 16, 32, 64, 128, 256, 512), (3,), ("channel",), (False,)),
    *itertools.product((32,), (8, 32, 128, 256), (3,), ("channel",), (False,)),
    *itertools.product((512,), (8, 64, 256), (3,), ("channel",), (False,)),
    *itertools.product((128,), (8, 32, 512), (4,), ("channel",), (False,)),
    *itertools.product((128,), (8, 32, 512), (3,), (32,), (False,)),
    *itertools.product((128,), (8, 32, 512), (3,), ("channel",), (True,)),
]
"""Inputs, rows, bits, what shares a scale, whether there is a bias that follows."""


def mixed(rng, size):
    mix = rng.normal(size=(size, size)) * 0.3 * (128 / size) ** 0.5 + np.eye(size)
    return lambda many: rng.normal(size=(many, size)) @ mix


def apart(rng, size):
    return lambda many: rng.normal(size=(many, size))


def relu(rng, size):
    mix = rng.normal(size=(size, size)) / size**0.5
    return lambda many: np.maximum(rng.normal(size=(many, size)) @ mix + 0.3, 0)


def low(rng, size):
    mix = rng.normal(size=(size // 8, size)) / (size // 8) ** 0.5
    return lambda many: rng.normal(size=(many, size // 8)) @ mix + 0.2 * rng.normal(size=(many, size))


def tokens(rng, size):
    mix, scale = rng.normal(size=(size, size)) / size**0.5, np.exp(0.8 * rng.normal(size=size))

    def draw(many):
        shared = np.repeat(rng.normal(size=(-(-many // 8), size)), 8, 0)[:many]
        return (shared + rng.normal(size=(many, size))) @ mix * scale

    return draw


KINDS = {f.__name__: f for f in (mixed, apart, relu, low, tokens)}


def layer(params, x):
    y = x @ params["w"]
    return y + params["b"] if "b" in params else y


def measure(kind, size, rows, bits, per, bias, method, seed):
    rng = np.random.default_rng(seed)
    draw = KINDS[kind](rng, size)
    params = {"w": jnp.asarray(rng.normal(size=(size, NEURONS)), jnp.float32)}
    if bias:
        params["b"] = jnp.zeros(NEURONS)
    x, new = (np.asarray(draw(many), np.float32) for many in (rows, NEW))
    rules = [lcq.Rule("w", lcq.Uniform(bits, per=per))]
    wanted = layer(jax_free(params), new.astype(np.float64))

    def error(forms):
        got = layer(jax_free(lcq.decompress(forms)), new.astype(np.float64))
        return float(((got - wanted) ** 2).sum() / (wanted**2).sum())

    compressed = error(lcq.compress(params, rules))
    done = lcq.quantize(layer, params, [x], rules, method)
    plain = lcq.quantize(layer, params, [x], rules, lcq.ptq.ROUNDING_METHODS[method](shrink=0.0))
    found = done.records[0]
    return {
        "ratio": error(done.forms) / compressed,
        "plain": error(plain.forms) / compressed,
        "held_out": found.held_out / compressed,
        "error": found.error / compressed,
        "shrink": found.shrink,
    }


def jax_free(params):
    return {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}


def table() -> str:
    """The worst ratio of every method over kinds, and of all methods with shrink=0; a row for each cell of the grid."""
    lines = []
    for size, rows, bits, per, bias in GRID:
        cell = {"inputs": size, "rows": rows, "bits": bits, "per": per, "bias": bias}
        found = [row for row in stored("gpfq_rows") if cell.items() <= row.items()]
        methods = [max(row["ratio"] for row in found if row["method"] == method) for method in METHODS]
        plain = max(row["plain"] for row in found)
        what = f"{size} inputs, {rows} rows, {bits} bits, {'channel' if per == 'channel' else f'groups of {per}'}"
        lines.append([what + ", bias" * bias, *(f"{ratio:.3f}" for ratio in (*methods, plain))])
    return grid(["", "RTN", "GPFQ", "GPTQ", "Qronos", "`descent`", "worst with `shrink=0`"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, nargs="+")
    parser.add_argument("--rows", type=int, nargs="+")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    args = parser.parse_args()
    part = args.inputs or args.rows or args.kinds != list(KINDS) or args.methods != list(METHODS)
    made = []
    for (size, rows, bits, per, bias), method in itertools.product(GRID, args.methods):
        if (args.inputs and size not in args.inputs) or (args.rows and rows not in args.rows):
            continue
        for kind in args.kinds:
            found = [measure(kind, size, rows, bits, per, bias, method, seed) for seed in args.seeds]
            row = {"kind": kind, "inputs": size, "rows": rows, "bits": bits, "per": per, "bias": bias, "method": method}
            row |= {key: round(float(np.mean([each[key] for each in found])), 4) for key in found[0]}
            row["worst"] = round(max(each["ratio"] for each in found), 4)
            made.append(row)
            print(row, flush=True)
    many = [row for row in made if row["rows"] >= 4 * row["inputs"]]
    print(f"worst ratio {max(row['worst'] for row in made):.3f}")
    if many:
        print(
            f"with 4 rows an input or more, over plain {max(row['ratio'] / row['plain'] for row in many):.3f} at worst"
        )
    if not part:
        record("gpfq_rows", made, seeds=args.seeds)


if __name__ == "__main__":
    main()
