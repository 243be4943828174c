"""The command `lcq` as it starts: all that takes time to import is imported where Ctrl-C is one line."""

import sys


def main() -> int:
    """Runs the command line of `lcq.cli` and returns its exit status; 130 if interrupted while that is imported."""
    try:
        from lcq.cli import main as command

        return command()
    except KeyboardInterrupt:
        print("lcq: interrupted", file=sys.stderr)
        return 130
