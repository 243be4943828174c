"""The commands of `lcq`, their options, and what runs them."""

import argparse
import re
from pathlib import Path

from lcq.cli.demo import QUICK, RECIPE, demo
from lcq.cli.export import export_file, parse_name
from lcq.cli.files import compress, decompress, import_, quantize
from lcq.cli.inspect import inspect_file, table_of_file
from lcq.io.exports import EXPORT_FORMATS, Name
from lcq.plans.text import parse_rule
from lcq.ptq.rounding import ROUNDING_METHODS
from lcq.schemes import SCHEMES
from lcq.tree.rules import Rule


def parser(common: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """All of the command line; options of `common` stand before the command."""
    whole = argparse.ArgumentParser(
        prog="lcq",
        parents=[common],
        description="Compress the parameters of any JAX function, and run the result.",
        epilog="lcq COMMAND --help has all options of a command; lcq demo is a first look, about a minute on a CPU.",
    )
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
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
    sub.add_argument("-o", "--out", type=Path, metavar="OUT.lcq", help="the file to write")
    sub.add_argument("--dry-run", action="store_true", help="only say which leaf goes where and what it will cost")
    sub.set_defaults(run=compress, usage_error=sub.error)

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
    sub.add_argument("-o", "--out", type=Path, metavar="OUT.lcq", help="the file to write")
    sub.add_argument("--dry-run", action="store_true", help="only say which leaf goes where and what it will cost")
    sub.set_defaults(run=quantize, usage_error=sub.error)

    sub = commands.add_parser(
        "import",
        parents=[force],
        help="checkpoint of codes -> .lcq, the same codes",
        description="Weights that are codes already become forms of the same codes, scales and zeros: .gguf files, "
        "folders of safetensors by compressed-tensors, GPTQ or fp8 (their config.json says so), orbax folders of qwix.",
    )
    sub.add_argument("checkpoint", type=Path, metavar="IN", help="the checkpoint")
    sub.add_argument("-o", "--out", type=Path, required=True, metavar="OUT.lcq", help="the file to write")
    sub.set_defaults(run=import_)

    sub = commands.add_parser("inspect", help="what an .lcq file is made of: format, tensors, metadata, plan")
    sub.add_argument("file", type=Path, metavar="FILE.lcq", help="the file, or the index of a set")
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
    sub.add_argument("file", type=Path, metavar="FILE.lcq", help="the file, or the index of a set")
    sub.add_argument("--reference", type=Path, metavar="IN", help="the weights before, to tell how far it is")
    sub.add_argument("--html", type=Path, metavar="PAGE.html", help="also write one page with plots, for a browser")
    sub.set_defaults(run=lambda a: table_of_file(a.file, a.reference, a.html, force=a.force, limit=a.limit))

    sub = commands.add_parser(
        "export",
        parents=[force, limit],
        help=".lcq -> what another program reads",
        description="Codes go out as they are. What a format cannot hold is refused by leaf; what it rounds is shown. "
        "A name is PATTERN=TENSOR: a regular expression for the whole path of a leaf, and what it is called in the "
        "other program's file, with '; layout=io', '; stacked=N', '; heads=N', '; experts=N' or '; type=int8' after "
        "it. The first that matches decides; without a tensor the leaf is left out.",
    )
    sub.add_argument("file", type=Path, metavar="FILE.lcq", help="the file, or the index of a set")
    sub.add_argument("--to", choices=EXPORT_FORMATS, required=True, help="what reads it")
    sub.add_argument("-o", "--out", type=Path, required=True, metavar="OUT", help="the file or folder")
    sub.add_argument(
        "--name",
        dest="names",
        action="append",
        default=[],
        type=_name,
        metavar="PATTERN=TENSOR",
        help="such as 'head/kernel=lm_head.weight; layout=io'; repeat as needed",
    )
    sub.add_argument("--llama", action="store_true", help="GGUF's names of a llama with those of Hugging Face")
    sub.add_argument(
        "--config",
        type=Path,
        metavar="CONFIG.json",
        help="of the model, metadata of GGUF or a .gguf file that has them, or the dense model in ONNX",
    )
    sub.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="the model's tokenizer.json, or its folder: into GGUF's metadata, of byte pairs; or beside safetensors",
    )
    sub.add_argument(
        "--nearest", type=_positive, metavar="BITS", help="write a grid for tables that are none, and masks dense"
    )
    sub.set_defaults(run=export_file)

    sub = commands.add_parser("decompress", parents=[force, limit], help=".lcq -> checkpoint, dense again")
    sub.add_argument("file", type=Path, metavar="FILE.lcq", help="the file, or the index of a set")
    sub.add_argument("-o", "--out", type=Path, required=True, metavar="OUT", help=".safetensors, .npz, or a folder")
    sub.set_defaults(run=decompress)
    return whole


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


def _reference(words: str) -> tuple[str, str]:
    module, colon, name = words.partition(":")
    module = module.removesuffix(".py")
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
