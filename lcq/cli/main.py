"""The command line: lcq demo, compress, quantize, import, inspect, table, decompress, export.

Exit status: 0 done; 1 bad input or data, said in one line on stderr; 2 bad usage; 130 interrupted; 141 if whoever reads
stdout has gone. Tables go to stdout, progress, notes, warnings and errors to stderr, with remedies as they are typed.
"""

import argparse
import contextlib
import importlib.metadata
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import lcq
from lcq.cli.words import in_words_of_the_command
from lcq.interrupt import raise_interrupts


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit status."""
    name = "lcq"
    try:
        arguments = _parsed(sys.argv[1:] if argv is None else argv)
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


def _parsed(argv: Sequence[str]) -> argparse.Namespace:
    """What is to be run. The version is there before all that commands need, which takes a while to import."""
    common = argparse.ArgumentParser(prog="lcq", add_help=False)
    version = f"lcq {lcq.__version__} (jax {importlib.metadata.version('jax')})"
    common.add_argument("--version", action="version", version=version)
    common.parse_known_args(argv[:1])
    from lcq.cli.parser import parser

    raise_interrupts()
    return parser(common).parse_args(argv)


@contextlib.contextmanager
def _warnings_in_a_line(name: str) -> Iterator[None]:
    """Warnings of this block without the place in the code that raised them."""

    def show_warning(message: Warning | str, category: type[Warning], *place: Any) -> None:
        del category, place
        print(f"{name}: warning: {in_words_of_the_command(str(message))}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show_warning  # type: ignore[assignment]
        yield
