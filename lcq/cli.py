"""The command line: lcq demo, compress, inspect, decompress.

Exit status: 0 done; 1 bad input or data, said in one line on stderr; 2 bad usage; 130 interrupted. Tables go to stdout,
progress and errors to stderr.
"""

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import rich.table
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text
from safetensors import safe_open

import lcq
from lcq import plot
from lcq.artifact import checkpoint
from lcq.examples import data, models
from lcq.examples.train import Score, cross_entropy, endless, evaluate, train
from lcq.plan import SCHEMES, dry_run, parse_rule
from lcq.report import table, text
from lcq.rules import Rule, flatten, resolve
from lcq.tree import check_finite, replace, take


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit status."""
    try:
        arguments = _parser().parse_args(argv)
        arguments.run(arguments)
    except SystemExit as leave:  # argparse has said why
        return int(leave.code or 0)
    except (ValueError, OSError) as error:
        words = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) and error.filename else error
        print(f"lcq {arguments.command}: {words}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"lcq {arguments.command}: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lcq", description=lcq.__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    force = argparse.ArgumentParser(add_help=False)
    force.add_argument("--force", action="store_true", help="replace what is there")

    sub = commands.add_parser("demo", parents=[force], help="compress a net that learns handwritten digits")
    sub.add_argument("--out", type=Path, default=Path("lcq-demo"), metavar="DIR", help="for files and figures")
    sub.add_argument("--seed", type=int, default=0, help="of the first weights and the order of the batches")
    sub.add_argument("--quick", action="store_true", help=argparse.SUPPRESS)  # a few steps, for tests
    sub.set_defaults(run=lambda a: demo(a.out, a.seed, force=a.force, recipe=QUICK if a.quick else RECIPE))

    sub = commands.add_parser(
        "compress",
        parents=[force],
        help="checkpoint -> .lcq",
        description="Direct compression of a checkpoint (.safetensors, .npz, or an orbax folder). A rule is "
        "PATTERN=SCHEME: a regular expression for the whole path of a leaf, keys joined by '/', and one of "
        f"{', '.join(SCHEMES)} or None, with '; joint' or '; stacked=N' after it. The first rule that matches decides.",
    )
    sub.add_argument("checkpoint", type=Path, metavar="IN")
    sub.add_argument(
        "--rule",
        dest="rules",
        action="append",
        required=True,
        type=_rule,
        metavar="PATTERN=SCHEME",
        help="such as '(.*/)?kernel=KMeans(4)'; repeat as needed",
    )
    sub.add_argument("-o", "--out", type=Path, metavar="OUT.lcq")
    sub.add_argument("--dry-run", action="store_true", help="only say which leaf goes where and what it will cost")
    sub.set_defaults(run=_compress, usage_error=sub.error)

    sub = commands.add_parser("inspect", help="what is in an .lcq file, and what it costs")
    sub.add_argument("file", type=Path, metavar="FILE.lcq")
    sub.set_defaults(run=_inspect)

    sub = commands.add_parser("decompress", parents=[force], help=".lcq -> checkpoint, dense again")
    sub.add_argument("file", type=Path, metavar="FILE.lcq")
    sub.add_argument("-o", "--out", type=Path, required=True, metavar="OUT", help=".safetensors, .npz, or a folder")
    sub.set_defaults(run=_decompress)
    return parser


def _rule(words: str) -> Rule:
    try:
        return parse_rule(words)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


# compress, inspect, decompress


def _compress(arguments: argparse.Namespace) -> None:
    if not arguments.dry_run:
        if arguments.out is None:
            arguments.usage_error("wanted -o OUT.lcq, or --dry-run")
        _refuse(arguments.force, arguments.out)
    params = checkpoint.read(arguments.checkpoint)
    if arguments.dry_run:
        return _show(dry_run(params, arguments.rules))
    tasks = resolve(arguments.rules, params)
    leaves, structure = flatten(params)
    forms = []
    with _progress(len(tasks)) as advance:
        for task in tasks:
            advance(", ".join(task.paths), 0)
            for path in task.paths:
                check_finite(path, leaves[path])
            forms.append(tuple(form.pack() for form in task.project(take(leaves, task))))
            advance("", 1)
    tree = replace(structure, leaves, tasks, forms)
    size = lcq.save(arguments.out, tree)
    _show(table(tree, params, on_disk=size))


def _inspect(arguments: argparse.Namespace) -> None:
    tree = lcq.load(arguments.file)
    size = arguments.file.stat().st_size
    report = table(tree, on_disk=size)
    with safe_open(arguments.file, "numpy") as file:
        metadata, tensors = file.metadata(), len(list(file.keys()))
    with open(arguments.file, "rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
    raw = report.total.bytes
    print(f"{arguments.file}: format {metadata['format']} {metadata['version']}, {tensors} tensors")
    print(f"{size:,} bytes: {raw:,} of forms and arrays, {header:,} of header, {size - raw - header:,} of padding")
    _show(report)


def _decompress(arguments: argparse.Namespace) -> None:
    _refuse(arguments.force, arguments.out)
    params = lcq.decompress(lcq.load(arguments.file))
    if not arguments.out.is_dir():
        return checkpoint.write(arguments.out, params)
    if not (arguments.out / "_METADATA").exists():
        raise ValueError(f"{arguments.out}: a folder, but not of an orbax checkpoint; choose another name")
    with tempfile.TemporaryDirectory(dir=arguments.out.parent) as beside:  # the old one goes when the new one is whole
        checkpoint.write(Path(beside, "new"), params)
        arguments.out.rename(Path(beside, "old"))
        Path(beside, "new").rename(arguments.out)


def _refuse(force: bool, *paths: Path) -> None:
    """Raises unless nothing would be replaced, or that is what was asked for."""
    if not force and (there := [str(path) for path in paths if path.exists() or path.is_symlink()]):
        raise ValueError(f"{', '.join(there)}: already there; choose another name, or replace it with --force")


# demo


class Recipe(NamedTuple):
    """How the demo trains.

    Attributes:
        updates: of the float net.
        l_steps: per LC run, of `every` updates.
        every: updates per L step.
        mu: the first penalty weight; the next are `factor` times the last.
        factor: see `mu`.
        learning_rate: of the L steps.
        bits: per weight, one LC run each; b bits are 2^b levels.
        widths: of the net's layers.
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
    figures = {"curves": out / "accuracy.png", "weights": out / "weights.png"}
    _refuse(force, *files.values(), *figures.values())
    split = data.digits()
    net = models.MLP(recipe.widths, jax.nn.relu)

    def apply(params: Any, x: Any) -> Any:
        return net.apply({"params": params}, x)

    trees = _demo_trees(apply, net.init(jax.random.key(seed), split.x_train[:1])["params"], split, seed, recipe)
    out.mkdir(parents=True, exist_ok=True)
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
    _show(_summary(results))
    drawn = {
        label: [(r.bits, 100 * r.test.accuracy) for r in results if r.name == name]
        for name, label in (("lc", "LC"), ("dc", "direct compression"))
    }
    reference = ("float", 100 * results[0].test.accuracy)
    plot.write(plot.curves(drawn, reference=reference), figures["curves"])
    middle = trees[f"lc-{recipe.bits[len(recipe.bits) // 2]}bit"]
    plot.write(plot.histograms(middle, trees["float"]), figures["weights"])
    print(f"bits: of all weights and biases; on disk: bytes; accuracy: on {len(split.x_test)} test digits")
    print(f"{len(files)} files saved, reloaded and found equal, and 2 figures: {out}{os.sep}")


def _demo_trees(apply: Any, start: Any, split: data.Split, seed: int, recipe: Recipe) -> dict[str, Any]:
    """The trained net, and what direct compression and LC make of it."""
    loss = cross_entropy(apply)
    updates = (recipe.l_steps + 1) * recipe.every
    with _progress(recipe.updates + len(recipe.bits) * updates) as advance:

        def run(what: str, params: Any, tx: Any, steps: int, order: int) -> Any:
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


def _same(path: Path, tree: Any, back: Any) -> None:
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


# The terminal


def _show(renderable: Any) -> None:
    """In colour and as wide as the terminal; as plain text, never cut, where there is none."""
    console = Console()
    if console.is_terminal:
        console.print(renderable)
    else:
        print(text(renderable))


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[str, int], None]]:
    """A bar on stderr while the block runs; call what it gives with a label ("" keeps the last) and the steps made."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        yield lambda label, steps: bar.update(task, advance=steps, description=label or None)
