"""What `import lcq` gives, and what it does not take yet."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lcq

STUB = ast.parse((Path(lcq.__file__).parent / "__init__.pyi").read_text())


def imported_after(code):
    """The modules that a fresh Python has after some code."""
    told = [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"]
    return set(subprocess.run(told, capture_output=True, text=True, check=True).stdout.split())


def test_nothing_is_imported_before_it_is_used():
    modules = imported_after("import lcq")
    assert "lcq.forms.codes" in modules and not {"flax", "optax", "rich", "lcq.training", "lcq.ptq"} & modules
    assert "lcq.training" in imported_after("import lcq\nlcq.lc")


def test_the_stub_says_what_there_is():
    (names,) = [ast.literal_eval(node.value) for node in STUB.body if isinstance(node, ast.Assign)]
    assert sorted(names) == sorted(lcq.__all__) == dir(lcq)
    assert all(hasattr(lcq, name) for name in names)
    with pytest.raises(AttributeError, match="nothing"):
        lcq.nothing  # noqa: B018


def test_flax_knows_forms_whichever_is_imported_first():
    """And is not imported by them."""
    use = "print(fs.to_state_dict(lcq.forms.Cast(jnp.ones(2)))['form'].dtype)"
    for first, second in (("lcq", "flax.serialization as fs"), ("flax.serialization as fs", "lcq")):
        code = f"import {first}\nimport {second}\nimport jax.numpy as jnp\n{use}"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout == "uint8\n", done.stderr
