"""lcq demo: a net that learns handwritten digits, and what direct compression and LC make of it."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import rich.table
from jaxtyping import PyTree
from rich import box
from rich.text import Text

import lcq
from lcq.cli.console import check_output, progress, refuse, show
from lcq.examples import data, figures, models
from lcq.examples.train import Score, cross_entropy, endless, evaluate, train
from lcq.reporting.summary import table
from lcq.tree.aliases import Params
from lcq.tree.paths import flatten


class Recipe(NamedTuple):
    """How the demo trains.

    Attributes:
        updates: How many updates the float net is trained for.
        l_steps: How many L steps an LC run has.
        every: How many updates an L step has.
        mu: The first penalty weight; the next are `factor` times the last.
        factor: What the penalty weight is multiplied by from one L step to the next.
        learning_rate: The learning rate of the L steps.
        bits: The bits per weight, one LC run each; b bits are 2^b levels.
        widths: How wide the net's layers are.
    """

    updates: int
    l_steps: int
    every: int
    mu: float
    factor: float
    learning_rate: float
    bits: tuple[int, ...] = (1, 2, 4)
    widths: tuple[int, ...] = (100, 50, 10)


RECIPE = Recipe(updates=1500, l_steps=40, every=100, mu=3e-4, factor=1.25, learning_rate=0.1)
"""Of eight, the least loss at 1 bit on 300 training digits held out, over three seeds; test digits took no part."""
QUICK = Recipe(updates=20, l_steps=3, every=5, mu=1e-3, factor=30.0, learning_rate=0.1, bits=(1,), widths=(10,))
_BATCH = 64


class _Result(NamedTuple):
    name: str
    bits: int
    table: Any
    train: Score
    test: Score


def demo(out: Path, seed: int = 0, *, force: bool = False, recipe: Recipe = RECIPE) -> None:
    """Trains a net on 8x8 digits, compresses its kernels to 1, 2 and 4 bits, directly and by LC, and tells how it went.

    Args:
        out: folder for the `.lcq` files and two figures; made if needed.
        seed: of the first weights and the order of the batches.
        force: whether files may be replaced.
        recipe: how long to train.

    Raises:
        ValueError: files that are there already, or a file that does not give back what was saved.
    """
    names = ["float", *(f"{method}-{bits}bit" for bits in recipe.bits for method in ("dc", "lc"))]
    files = {name: out / f"{name}.lcq" for name in names}
    drawings = {"curves": out / "accuracy.png", "weights": out / "weights.png"}
    refuse(force, *files.values(), *drawings.values())
    out.mkdir(parents=True, exist_ok=True)
    for path in (*files.values(), *drawings.values()):
        check_output(path)
    split = data.digits()
    net = models.MLP(recipe.widths, jax.nn.relu)

    def apply(params: Params, x: Any) -> Any:
        return net.apply({"params": params}, x)

    trees = _demo_trees(apply, net.init(jax.random.key(seed), split.x_train[:1])["params"], split, seed, recipe)
    results = []
    for name, tree in trees.items():
        size = lcq.save(files[name], tree)
        back = lcq.load(files[name])
        _same(files[name], tree, back)
        on_train, on_test = (
            evaluate(apply, back, *xy) for xy in ((split.x_train, split.y_train), (split.x_test, split.y_test))
        )
        bits = 32 if name == "float" else int(name[3:-3])
        results.append(_Result(name.split("-")[0], bits, table(back, on_disk=size), on_train, on_test))
    show(_summary(results))
    drawn = {
        label: [(r.bits, 100 * r.test.accuracy) for r in results if r.name == name]
        for name, label in (("lc", "LC"), ("dc", "direct compression"))
    }
    reference = ("float", 100 * results[0].test.accuracy)
    figures.write(figures.curves(drawn, reference=reference), drawings["curves"])
    middle = recipe.bits[len(recipe.bits) // 2]
    title = f"LC to {middle} bit{'s' * (middle > 1)}: weights of the float net, and the levels they became"
    figures.write(figures.histograms(trees[f"lc-{middle}bit"], trees["float"], title=title), drawings["weights"])
    print(f"bits: of all weights and biases; on disk: bytes; accuracy: on {len(split.x_test)} test digits")
    print(f"{len(files)} files saved, reloaded and found equal, and 2 figures: {out}{os.sep}")


def _demo_trees(apply: Any, start: Any, split: data.Split, seed: int, recipe: Recipe) -> dict[str, Any]:
    """The trained net, and what direct compression and LC make of it."""
    loss = cross_entropy(apply)
    updates = (recipe.l_steps + 1) * recipe.every
    with progress(recipe.updates + len(recipe.bits) * updates) as advance:

        def run(what: str, params: Params, tx: Any, steps: int, order: int) -> Any:
            advance(what, 0)
            examples = endless(split.x_train, split.y_train, _BATCH, seed=order)
            return train(loss, params, tx, examples, steps, on_step=lambda number, now: advance(what, 1))

        adam = optax.adam(optax.cosine_decay_schedule(3e-3, recipe.updates))
        trees = {"float": run("training", start, adam, recipe.updates, seed).params}
        for bits in recipe.bits:
            rules = [lcq.Rule("(.*/)?kernel", lcq.KMeans(2**bits))]
            trees[f"dc-{bits}bit"] = lcq.compress(trees["float"], rules)
            tx = lcq.lc(
                lambda eta: optax.sgd(eta, momentum=0.9, nesterov=True),
                rules,
                mu=lcq.geometric(recipe.mu, recipe.factor, steps=recipe.l_steps),
                every=recipe.every,
                learning_rate=recipe.learning_rate,
            )
            done = run(f"LC to {bits} bit", trees["float"], tx, updates, seed + 1)
            trees[f"lc-{bits}bit"] = lcq.extract(done.opt_state, done.params)
    return trees


def _same(path: Path, tree: PyTree, back: Any) -> None:
    """Raises unless what was reloaded has the same dense weights, bit for bit."""
    wanted, got = flatten(lcq.decompress(tree))[0], flatten(lcq.decompress(back))[0]
    for leaf in wanted.keys() | got.keys():
        if leaf not in wanted or leaf not in got or not np.array_equal(wanted[leaf], got[leaf]):
            raise ValueError(f"{path}: {leaf} is not what was saved")


def _summary(results: list[_Result]) -> rich.table.Table:
    """A line for each net; fits 80 columns."""
    grid = rich.table.Table(box=box.SIMPLE_HEAD, pad_edge=False)
    grid.add_column("net", style="bold")
    for name in ("bits", "ratio", "on disk", "file ratio", "train loss", "accuracy"):
        grid.add_column(name, justify="right", no_wrap=True)
    full = results[0].table.on_disk
    for i, (name, bits, report, on_train, on_test) in enumerate(results):
        grid.add_row(
            "float" if name == "float" else f"{bits} bit, {'LC' if name == 'lc' else 'direct'}",
            f"{report.total.bits:,}",
            f"{report.total.ratio:.2f}",
            f"{report.on_disk:,}",
            f"{full / report.on_disk:.2f}",
            f"{on_train.loss:.4f}",
            Text(f"{100 * on_test.accuracy:.1f} %", style="bold green" if name == "lc" else ""),
            end_section=i % 2 == 0,
        )
    return grid
