"""The command line: lcq demo, compress, quantize, import, inspect, table, decompress, export.

Exit status: 0 done; 1 bad input or data, said in one line on stderr; 2 bad usage; 130 interrupted; 141 if whoever reads
stdout has gone. Tables go to stdout, progress, notes, warnings and errors to stderr, with remedies as they are typed.
"""

import argparse
import contextlib
import importlib.metadata
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree

import lcq
from lcq.cli.calibration import batches_of, function_of, products_of
from lcq.cli.console import check_output, in_words_of_the_command, progress, refuse, show
from lcq.cli.demo import QUICK, RECIPE, demo
from lcq.cli.export import export_file, parse_name
from lcq.cli.inspect import inspect_file, table_of_file
from lcq.forms.base import is_form
from lcq.interrupt import raise_interrupts
from lcq.io.checkpoints import checkpoint
from lcq.io.exports import EXPORT_FORMATS, Name
from lcq.io.file import read_metadata
from lcq.plans.dry_run import dry_run
from lcq.plans.text import parse_rule
from lcq.ptq.rounding import ROUNDING_METHODS, SPFQ
from lcq.reporting.summary import table
from lcq.schemes import SCHEMES
from lcq.tree.aliases import Params
from lcq.tree.compress import check_finite, replace, take
from lcq.tree.paths import flatten
from lcq.tree.rules import Rule, resolve


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit status."""
    name = "lcq"
    try:
        raise_interrupts()
        arguments = _parser().parse_args(argv)
        name = f"lcq {arguments.command}"
        with _warnings_in_a_line(name):
            arguments.run(arguments)
        sys.stdout.flush()
    except SystemExit as leave:  # argparse has said why
        return int(leave.code or 0)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left in the buffer goes nowhere
        return 141
    except (ValueError, OSError) as error:
        words = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) and error.filename else error
        print(f"{name}: {in_words_of_the_command(str(words))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    return 0


@contextlib.contextmanager
def _warnings_in_a_line(name: str) -> Iterator[None]:
    """Warnings of this block without the place in the code that raised them."""

    def show_warning(message: Warning | str, category: type[Warning], *place: Any) -> None:
        del category, place
        print(f"{name}: warning: {in_words_of_the_command(str(message))}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show_warning  # type: ignore[assignment]
        yield


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lcq",
        description="Compress the parameters of any JAX function, and run the result.",
        epilog="lcq COMMAND --help has all options of a command; lcq demo is a first look, about a minute on a CPU.",
    )
    version = f"lcq {importlib.metadata.version('lcq')} (jax {jax.__version__})"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    force = argparse.ArgumentParser(add_help=False)
    force.add_argument("--force", action="store_true", help="replace what is there")
    limit = argparse.ArgumentParser(add_help=False)
    limit.add_argument(
        "--limit",
        type=_bytes,
        metavar="SIZE",
        help="what an .lcq file may take in memory, streams and dense tree, such as 40G; default: 16G, or 64 times the "
        "file if that is more",
    )
    sets = argparse.ArgumentParser(add_help=False)
    sets.add_argument(
        "--max-shard-bytes",
        type=_bytes,
        metavar="SIZE",
        help="write several files of at most this size, such as 2G, beside OUT.lcq, which then is their index",
    )
    rules = argparse.ArgumentParser(add_help=False)
    either = rules.add_mutually_exclusive_group(required=True)
    either.add_argument(
        "--rule",
        dest="rules",
        action="append",
        type=_rule,
        metavar="PATTERN=SCHEME",
        help="such as '(.*/)?kernel=KMeans(4)'; repeat as needed",
    )
    either.add_argument("--plan", type=Path, metavar="PLAN.toml", help="all rules, in TOML or from an .lcq file")

    sub = commands.add_parser("demo", parents=[force], help="compress a net that learns handwritten digits")
    sub.add_argument("--out", type=Path, default=Path("lcq-demo"), metavar="DIR", help="for files and figures")
    sub.add_argument("--seed", type=int, default=0, help="of the first weights and the order of the batches")
    sub.add_argument("--quick", action="store_true", help=argparse.SUPPRESS)  # a few steps, for tests
    sub.set_defaults(run=lambda a: demo(a.out, a.seed, force=a.force, recipe=QUICK if a.quick else RECIPE))

    sub = commands.add_parser(
        "compress",
        parents=[rules, force, sets],
        help="checkpoint -> .lcq",
        description="Direct compression of a checkpoint (.safetensors, .npz, .gguf, .weights.h5, a folder of "
        "safetensors shards with an index, or an orbax folder). A rule is PATTERN=SCHEME: a regular expression for the "
        "whole path of a leaf, keys joined by '/', and one of "
        f"{', '.join(SCHEMES)} or None, with '; joint', '; stacked=N' or '; layout=oi' after it. "
        "The first rule that matches decides.",
    )
    sub.add_argument("checkpoint", type=Path, metavar="IN", help="the checkpoint")
    sub.add_argument("-o", "--out", type=Path, metavar="OUT.lcq")
    sub.add_argument("--dry-run", action="store_true", help="only say which leaf goes where and what it will cost")
    sub.set_defaults(run=_compress, usage_error=sub.error)

    sub = commands.add_parser(
        "quantize",
        parents=[rules, force, sets],
        help="checkpoint + unlabelled inputs -> .lcq",
        description="Quantization without labels or training: each layer is rounded so that its results on the data "
        "change least. FUNCTION(params, batch) runs the net, params being the checkpoint's arrays in nested dicts; "
        "for flax write a function of three lines in a file of the current folder. Rules are those of compress.",
    )
    sub.add_argument("function", type=_reference, metavar="MODULE:FUNCTION", help="such as mynet:apply, for mynet.py")
    sub.add_argument("checkpoint", type=Path, metavar="IN", help="the checkpoint")
    sub.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="DATA.npz",
        help="inputs, examples along the first axis; several arrays make each batch a dict of them",
    )
    sub.add_argument(
        "--mask",
        metavar="NAME",
        help="which of these arrays says by 1 and 0 what positions of the others count; it stays in the batch",
    )
    sub.add_argument(
        "--rtn-rule",
        dest="rtn",
        action="append",
        default=[],
        type=_rule,
        metavar="PATTERN=SCHEME",
        help="for leaves that are used in other ways too, such as embeddings: rounded without data, before the others",
    )
    sub.add_argument("--method", choices=ROUNDING_METHODS, default="descent", help="default: %(default)s")
    sub.add_argument(
        "--batch",
        type=_positive,
        default=128,
        metavar="N",
        help="examples in a batch, the last may be shorter; default: 128",
    )
    sub.add_argument("--limit", type=_positive, metavar="N", help="use the first N examples only")
    sub.add_argument("--seed", type=int, default=0, help="of what spfq draws")
    sub.add_argument("--no-bias-correction", action="store_true", help="leave biases and batch-norm means as they are")
    sub.add_argument("-o", "--out", type=Path, metavar="OUT.lcq")
    sub.add_argument("--dry-run", action="store_true", help="only say which leaf goes where and what it will cost")
    sub.set_defaults(run=_quantize, usage_error=sub.error)

    sub = commands.add_parser(
        "import",
        parents=[force],
        help="checkpoint of codes -> .lcq, the same codes",
        description="Weights that are codes already become forms of the same codes, scales and zeros: .gguf files, "
        "folders of safetensors by compressed-tensors, GPTQ or fp8 (their config.json says so), orbax folders of qwix.",
    )
    sub.add_argument("checkpoint", type=Path, metavar="IN", help="the checkpoint")
    sub.add_argument("-o", "--out", type=Path, required=True, metavar="OUT.lcq")
    sub.set_defaults(run=_import)

    sub = commands.add_parser("inspect", help="what an .lcq file is made of: format, tensors, metadata, plan")
    sub.add_argument("file", type=Path, metavar="FILE.lcq")
    sub.add_argument(
        "--limit",
        type=_bytes,
        metavar="SIZE",
        help="what one leaf may take in memory, such as 40G; nothing is made dense; default: 16G, or 64 times the file "
        "if that is more",
    )
    sub.set_defaults(run=lambda a: inspect_file(a.file, a.limit))

    sub = commands.add_parser(
        "table", parents=[force, limit], help="what each leaf of an .lcq file costs, as text or a page"
    )
    sub.add_argument("file", type=Path, metavar="FILE.lcq")
    sub.add_argument("--reference", type=Path, metavar="IN", help="the weights before, to tell how far it is")
    sub.add_argument("--html", type=Path, metavar="PAGE.html", help="also write one page with plots, for a browser")
    sub.set_defaults(run=lambda a: table_of_file(a.file, a.reference, a.html, force=a.force, limit=a.limit))

    sub = commands.add_parser(
        "export",
        parents=[force, limit],
        help=".lcq -> what another program reads",
        description="Codes go out as they are. What a format cannot hold is refused by leaf; what it rounds is shown. "
        "A name is PATTERN=TENSOR: a regular expression for the whole path of a leaf, and what it is called in the "
        "other program's file, with '; layout=io', '; stacked=N', '; heads=N' or '; type=int8' after it. The first "
        "that matches decides; without a tensor the leaf is left out.",
    )
    sub.add_argument("file", type=Path, metavar="FILE.lcq")
    sub.add_argument("--to", choices=EXPORT_FORMATS, required=True, help="what reads it")
    sub.add_argument("-o", "--out", type=Path, required=True, metavar="OUT", help="the file or folder")
    sub.add_argument("--name", dest="names", action="append", default=[], type=_name, metavar="PATTERN=TENSOR")
    sub.add_argument("--llama", action="store_true", help="GGUF's names of a llama with those of Hugging Face")
    sub.add_argument(
        "--config",
        type=Path,
        metavar="CONFIG.json",
        help="of the model, metadata of GGUF or a .gguf file that has them, or the dense model in ONNX",
    )
    sub.add_argument(
        "--nearest", type=_positive, metavar="BITS", help="write a grid for tables that are none, and masks dense"
    )
    sub.set_defaults(run=export_file)

    sub = commands.add_parser("decompress", parents=[force, limit], help=".lcq -> checkpoint, dense again")
    sub.add_argument("file", type=Path, metavar="FILE.lcq")
    sub.add_argument("-o", "--out", type=Path, required=True, metavar="OUT", help=".safetensors, .npz, or a folder")
    sub.set_defaults(run=_decompress)
    return parser


def _rule(words: str) -> Rule:
    try:
        return parse_rule(words)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _name(words: str) -> Name:
    try:
        return parse_name(words)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _plan(arguments: argparse.Namespace) -> lcq.Plan:
    return lcq.Plan(arguments.rules) if arguments.plan is None else lcq.read_plan(arguments.plan)


def _reference(words: str) -> tuple[str, str]:
    module, colon, name = words.partition(":")
    if not (colon and all(part.isidentifier() for part in [*module.split("."), *name.split(".")])):
        raise argparse.ArgumentTypeError(f"expected MODULE:FUNCTION, such as mynet:apply, got {words!r}")
    return module, name


def _positive(words: str) -> int:
    if not (words.isascii() and words.isdigit() and int(words)):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {words!r}")
    return int(words)


def _bytes(words: str) -> int:
    """A number of bytes, with K, M, G or T for powers of 1,024."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)(?:i?B)?", words.strip(), re.IGNORECASE | re.ASCII)
    if found is None or not float(found[1]):
        raise argparse.ArgumentTypeError(f"expected a number of bytes, such as 40G, got {words!r}")
    return int(float(found[1]) * 1024 ** " KMGT".index(found[2].upper() or " "))


# compress, decompress


def _compress(arguments: argparse.Namespace) -> None:
    if not arguments.dry_run:
        if arguments.out is None:
            arguments.usage_error("expected -o OUT.lcq, or --dry-run")
        refuse(arguments.force, arguments.out)
        check_output(arguments.out, arguments.checkpoint)
    plan, (params, metadata, layout) = _plan(arguments), checkpoint.read_checkpoint(arguments.checkpoint)
    _say_layout(arguments.checkpoint, layout, plan)
    if arguments.dry_run:
        return show(dry_run(params, plan))
    tasks = resolve(plan, params)
    leaves, structure = flatten(params)
    forms = []
    with progress(len(tasks)) as advance:
        for task in tasks:
            advance(", ".join(task.paths), 0)
            for path in task.paths:
                check_finite(path, leaves[path])
            forms.append(tuple(form.pack() for form in task.project(take(leaves, task))))
            advance("", 1)
    _save(arguments, replace(structure, leaves, tasks, forms), params, plan, metadata)


def _say_layout(path: Path, layout: str | None, plan: lcq.Plan) -> None:
    """Says so where rules with scales of channels or groups take the weights of another layout for those of JAX."""
    plain = [(rule.pattern, rule.scheme.cuts) for rule in plan.rules if rule.scheme and rule.layout is None]
    named = [pattern for pattern, cuts in plain if any(isinstance(per, int | str) for per in cuts)]
    if layout is not None and named:
        print(
            f"lcq compress: note: {path} has weights in the layout {layout}; rules without '; layout={layout}' take "
            f"them for inputs by outputs: {', '.join(named)}",
            file=sys.stderr,
        )


def _import(arguments: argparse.Namespace) -> None:
    refuse(arguments.force, arguments.out)
    check_output(arguments.out, arguments.checkpoint)
    tree, metadata, _ = checkpoint.read_checkpoint(arguments.checkpoint, forms=True)
    if not any(map(is_form, flatten(tree)[0].values())):
        raise ValueError(
            f"{arguments.checkpoint}: expected weights that are codes, got arrays alone; lcq compress makes codes"
        )
    with progress() as advance:
        size = lcq.save(arguments.out, tree, metadata=metadata, progress=lambda i, n, name: advance(name, 1, n))
    show(table(tree, on_disk=size))


def _save(
    arguments: argparse.Namespace,
    tree: PyTree,
    params: Params,
    plan: lcq.Plan,
    metadata: dict[str, str],
    *before: Any,
) -> None:
    """Writes the file, and shows what it came to, after what comes before."""
    with progress() as advance:
        size = lcq.save(
            arguments.out,
            tree,
            plan=plan,
            metadata=metadata,
            max_shard_bytes=arguments.max_shard_bytes,
            progress=lambda i, n, name: advance(name, 1, n),
        )
    with progress() as advance:
        report = table(tree, params, on_disk=size, progress=lambda i, n, name: advance(name, 1, n))
    for renderable in (*before, report):
        show(renderable)


def _decompress(arguments: argparse.Namespace) -> None:
    refuse(arguments.force, arguments.out)
    kind = checkpoint.format_of(arguments.out)
    check_output(arguments.out, arguments.file, folder=True)
    params = lcq.decompress(lcq.load(arguments.file, limit=arguments.limit))
    metadata = read_metadata(arguments.file)
    if metadata and not kind.holds_metadata:
        kept = ", ".join(metadata)
        print(f"lcq decompress: note: {arguments.out} has no place for the metadata {kept}", file=sys.stderr)
        metadata = {}
    if not arguments.out.is_dir():
        return checkpoint.write(arguments.out, params, metadata)
    if not (arguments.out / "_METADATA").exists():
        raise ValueError(f"{arguments.out}: a folder, but not of an orbax checkpoint; choose another name")
    with tempfile.TemporaryDirectory(dir=arguments.out.parent) as beside:  # the old one goes when the new one is whole
        checkpoint.write(Path(beside, "new"), params)
        arguments.out.rename(Path(beside, "old"))
        Path(beside, "new").rename(arguments.out)


# quantize


def _quantize(arguments: argparse.Namespace) -> None:
    if not arguments.dry_run:
        if arguments.out is None:
            arguments.usage_error("expected -o OUT.lcq, or --dry-run")
        refuse(arguments.force, arguments.out)
        check_output(arguments.out, arguments.checkpoint, arguments.data)
    plan, (params, metadata, _) = _plan(arguments), checkpoint.read_checkpoint(arguments.checkpoint)
    batches = batches_of(arguments.data, arguments.batch, arguments.limit, arguments.mask)
    make = ROUNDING_METHODS[arguments.method]
    method = SPFQ(seed=arguments.seed) if make is SPFQ else make()
    with function_of(*arguments.function) as function:
        if arguments.dry_run:
            return show(dry_run(params, plan, function, batches[0], rtn=arguments.rtn))
        with progress() as advance:
            advance("tracing", 0)
            done = lcq.quantize(
                function,
                params,
                batches,
                plan,
                method,
                rtn=arguments.rtn,
                mask=arguments.mask,
                bias_correction=not arguments.no_bias_correction,
                progress=lambda number, total, record: advance(record.path, 1, total),
            )
    products = [products_of(done)] if done.records else []
    _save(arguments, done.forms, params, lcq.Plan([*arguments.rtn, *plan]), metadata, *products)
