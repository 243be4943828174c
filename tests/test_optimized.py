"""Tests that are about what XLA makes for users run once more, in processes where XLA optimises as it does for them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
AGAIN = {
    "the README": ("tests/test_readme.py", "code_blocks"),
    "layouts": ("tests/schemes/test_contract.py", "both_layouts"),
    "jit": ("tests/schemes/test_contract.py", "eager_is_jit"),
    "thresholds": ("tests/layers/test_frozen.py", ""),
}


@pytest.mark.parametrize("case", AGAIN)
def test_as_xla_compiles_for_users(case):
    path, names = AGAIN[case]
    command = [sys.executable, "-m", "pytest", "-n0", "-q", "-p", "no:cacheprovider", path, "-k", names]
    run = subprocess.run(command, cwd=ROOT, env=os.environ | {"XLA_FLAGS": ""}, capture_output=True, text=True)
    assert run.returncode == 0 and " passed" in run.stdout and "skipped" not in run.stdout, run.stdout[-5000:]
