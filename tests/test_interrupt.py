"""Ctrl-C while the command is importing: it ends, and prints nothing."""

import signal
import subprocess
import sys

import pytest

from lcq import interrupt


@pytest.fixture(autouse=True)
def interrupts_are_not_ignored():
    """As they are, and are inherited, where a shell has put the tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("last", ["numpy", "lcq.io.file"])
def test_an_interrupt_while_importing_prints_no_traceback(last):
    command = [sys.executable, "-X", "importtime", "-m", "lcq", "inspect", "net.lcq"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if line.rsplit("|")[-1].strip() == last:
                break
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(timeout=60) == -signal.SIGINT and process.stdout.read() == ""
    assert "Traceback" not in rest and "KeyboardInterrupt" not in rest


def test_other_programs_keep_their_interrupts():
    code = "import signal, lcq; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    done = subprocess.run([sys.executable, "-c", code, "-m", "lcq"], capture_output=True, text=True, timeout=120)
    assert done.stdout == "True\n" and not interrupt.STARTING


@pytest.mark.parametrize(
    ("arguments", "script", "ours"),
    [
        ("python -m lcq demo", "-m", True),
        ("python -X dev -m lcq", "-m", True),
        ("python -m train", "-m", False),
        ("python -m train -m lcq", "-m", False),
        ("python -mlcq", "-m", False),
        ("python bin/lcq inspect", "bin/lcq", True),
        ("python train.py -m lcq", "train.py", False),
        ("python", "", False),
    ],
)
def test_what_is_the_command(arguments, script, ours):
    assert interrupt.is_command(arguments.split(), script) == ours


def test_interrupts_are_raised_again_once_the_command_runs(monkeypatch):
    monkeypatch.setattr(interrupt, "STARTING", True)
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        interrupt.raise_interrupts()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
