"""lcq compress, quantize, import and decompress: a checkpoint becomes a file, and a file a checkpoint."""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from jaxtyping import PyTree

import lcq
from lcq.cli.calibration import batches_of, function_of, products_of
from lcq.cli.console import check_output, progress, refuse, show
from lcq.forms.base import is_form
from lcq.io.checkpoints import checkpoint
from lcq.io.checkpoints.base import CHECKPOINT_FORMATS
from lcq.io.file import read_metadata
from lcq.plans.dry_run import dry_run
from lcq.ptq.rounding import ROUNDING_METHODS, SPFQ
from lcq.reporting.summary import table
from lcq.tree.aliases import Params
from lcq.tree.compress import check_finite, replace, take
from lcq.tree.paths import flatten
from lcq.tree.rules import resolve


def compress(arguments: argparse.Namespace) -> None:
    if not arguments.dry_run:
        if arguments.out is None:
            arguments.usage_error("expected -o OUT.lcq, or --dry-run")
        _check_out(arguments, arguments.checkpoint)
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


def quantize(arguments: argparse.Namespace) -> None:
    if not arguments.dry_run:
        if arguments.out is None:
            arguments.usage_error("expected -o OUT.lcq, or --dry-run")
        _check_out(arguments, arguments.checkpoint, arguments.data)
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


def import_(arguments: argparse.Namespace) -> None:
    _check_out(arguments, arguments.checkpoint)
    tree, metadata, _ = checkpoint.read_checkpoint(arguments.checkpoint, forms=True)
    if not any(map(is_form, flatten(tree)[0].values())):
        raise ValueError(
            f"{arguments.checkpoint}: expected weights that are codes, got arrays alone; lcq compress makes codes"
        )
    with progress() as advance:
        size = lcq.save(arguments.out, tree, metadata=metadata, progress=lambda i, n, name: advance(name, 1, n))
    show(table(tree, on_disk=size))


def decompress(arguments: argparse.Namespace) -> None:
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


def _check_out(arguments: argparse.Namespace, *inputs: Path) -> None:
    """Raises unless an .lcq file can be written at OUT.lcq, under a name by which no other program would take it."""
    refuse(arguments.force, arguments.out)
    check_output(arguments.out, *inputs)
    suffixes = [CHECKPOINT_FORMATS[name].suffix for name in CHECKPOINT_FORMATS]
    if any(suffix and arguments.out.name.endswith(suffix) for suffix in suffixes):
        raise ValueError(
            f"{arguments.out}: expected the name of an .lcq file, got that of another kind; name it "
            f"{arguments.out.name.partition('.')[0]}.lcq"
        )


def _plan(arguments: argparse.Namespace) -> lcq.Plan:
    return lcq.Plan(arguments.rules) if arguments.plan is None else lcq.read_plan(arguments.plan)


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
