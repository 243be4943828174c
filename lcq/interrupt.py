"""Ctrl-C while the command is still importing ends it at once, without a traceback; `main` then says more.

The first thing that `lcq` imports, as Python reports an interrupted import before any code of the command could.
"""

import signal
import sys
from pathlib import Path


def is_command(arguments: list[str], script: str) -> bool:
    """Whether Python was started as `python -m lcq` or by the script `lcq`.

    Example:
        >>> is_command(["python", "-m", "lcq", "demo"], "-m"), is_command(["python", "train.py"], "train.py")
        (True, False)
    """
    if script == "-m" and "-m" in arguments:  # a package that is being imported by `python -m`
        return arguments[arguments.index("-m") + 1] == "lcq"
    return Path(script).stem == "lcq"


def raise_interrupts() -> None:
    """From here on Ctrl-C is a KeyboardInterrupt again."""
    if STARTING:
        signal.signal(signal.SIGINT, signal.default_int_handler)


STARTING = is_command(sys.orig_argv, sys.argv[0]) and signal.getsignal(signal.SIGINT) is signal.default_int_handler
"""Whether Ctrl-C ends this process until `raise_interrupts`."""

if STARTING:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
