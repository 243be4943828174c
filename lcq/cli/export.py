"""lcq export: .lcq -> files of other programs."""

import argparse
from pathlib import Path

from lcq.cli.console import check_output, progress, refuse, show
from lcq.cli.words import in_words_of_the_command
from lcq.io.checkpoints import open_gguf
from lcq.io.container import Json, read_object
from lcq.io.exports import EXPORT_FORMATS, Name, export, llama_names
from lcq.reporting.columns import Column, Columns

_WHOLE = {"stacked", "heads", "experts"}
_OPTIONS = ("layout", "stacked", "heads", "experts", "type")


def parse_name(words: str) -> Name:
    """A name as one types it: PATTERN=TENSOR, with '; layout=io' and the like behind it.

    Raises:
        ValueError: anything else.

    Example:
        >>> parse_name(r"layers/(.*)/kernel=blk.{0}.\\1.weight; layout=io; stacked=1").stacked
        1
    """
    first, *more = (part.strip() for part in words.split(";"))
    pattern, equals, tensor = first.rpartition("=")
    options: dict[str, Json] = {}
    for part in more:
        key, given, value = part.partition("=")
        if key not in _OPTIONS or not given or (key in _WHOLE and not value.isdecimal()):
            raise ValueError(f"expected one of {', '.join(_OPTIONS)} with =VALUE, got {part!r}")
        options[key] = int(value) if key in _WHOLE else value
    if not equals or not pattern:
        raise ValueError(f"expected PATTERN=TENSOR, such as 'head/kernel=lm_head.weight; layout=io', got {words!r}")
    return Name(pattern, tensor or None, **options)


def export_file(arguments: argparse.Namespace) -> None:
    """Writes the file or folder, and shows what it came to.

    Raises:
        ValueError: a leaf that the format cannot hold, or a name that does not fit.
    """
    out, file = arguments.out, arguments.file
    refuse(arguments.force, out)
    check_output(out, file, folder=not EXPORT_FORMATS[arguments.to].suffix)
    config = _config(arguments.config) if arguments.config is not None else {}
    names = tuple(arguments.names)
    if arguments.llama:
        if "num_attention_heads" not in config:
            raise ValueError("expected --config with num_attention_heads beside --llama, got none; give config.json")
        names += llama_names(config["num_attention_heads"], config.get("num_key_value_heads"))
    with progress() as advance:
        report = export(
            file,
            out,
            format=arguments.to,
            names=names,
            config=config,
            tokenizer=arguments.tokenizer,
            nearest=arguments.nearest,
            limit=arguments.limit,
            progress=lambda i, n, path: advance(path, 1, n),
        )
    headers = ("leaf", "tensor", "as", "bytes", "error", "because of")
    columns = zip(headers, zip(*report.cells(), strict=True), strict=True)
    cells = (Column(h, tuple(c), number=h in ("bytes", "error")) for h, c in columns)
    show(Columns(list(cells)))
    print(f"{out}: {arguments.to}, {report.bytes:,} bytes of {len(report.rows)} tensors")
    for note in report.notes:
        print(in_words_of_the_command(note))


def _config(path: Path) -> dict[str, Json]:
    """The JSON of a file, or of the config.json of a folder; a GGUF file's fields; of an ONNX model its path."""
    if path.suffix == ".onnx":
        return {"model": path}
    if path.suffix == ".gguf":
        return {name: field.value for name, field in open_gguf(path).fields.items()}
    return read_object(path / "config.json" if path.is_dir() else path)
