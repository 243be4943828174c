"""Tests that are about what XLA makes for users run once more, in processes where XLA optimises as it does for them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
AGAIN = {  # files, and words in the names of their tests
    "schemes": (("tests/schemes/test_contract.py",), "both_layouts or eager_is_jit"),
    "what is run": (("tests/test_readme.py", "tests/layers/test_frozen.py"), "code_blocks or test_frozen"),
}


@pytest.mark.parametrize("case", AGAIN)
def test_as_xla_compiles_for_users(case):
    paths, names = AGAIN[case]
    command = [sys.executable, "-m", "pytest", "-n0", "-q", "-p", "no:cacheprovider", *paths, "-k", names]
    run = subprocess.run(command, cwd=ROOT, env=os.environ | {"XLA_FLAGS": ""}, capture_output=True, text=True)
    assert run.returncode == 0 and " passed" in run.stdout and "skipped" not in run.stdout, run.stdout[-5000:]
