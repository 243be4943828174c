"""The house. import-linter keeps the order of the rooms and ruff what is banned (`pyproject.toml`); the rest is here.

A check is a function of a file's path and syntax tree that returns complaints. Each of them is seen to fail, and so are
import-linter and ruff.
"""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
VAGUE = {"utils", "util", "misc", "common", "helpers", "helper", "core", "tools"}


def name_says_something(path, tree):
    return [f"{part!r} says nothing about what is in it" for part in Path(path).with_suffix("").parts if part in VAGUE]


def no_optional_import(path, tree):
    """`try: import` hides a dependency; import plainly, where it is needed."""
    tries = [node for node in ast.walk(tree) if isinstance(node, ast.Try | ast.TryStar) and node.handlers]
    inside = [inner for node in tries for statement in node.body for inner in ast.walk(statement)]
    return [f"{n.lineno}: an import inside `try`" for n in inside if isinstance(n, ast.Import | ast.ImportFrom)]


def face_has_no_logic(path, tree):
    """lcq/__init__.py and its stub are a docstring, imports, and names with dunders such as `__all__`."""

    def allowed(node):
        if isinstance(node, ast.AnnAssign):
            return ast.unparse(node.target) == "__version__"
        if isinstance(node, ast.Assign):
            return all(ast.unparse(target).lstrip("(").startswith("__") for target in node.targets)
        return isinstance(node, ast.Import | ast.ImportFrom | ast.Expr) or (
            isinstance(node, ast.FunctionDef) and node.name in ("__getattr__", "__dir__")
        )

    return [
        f"{n.lineno}: the face holds imports only"
        for n in tree.body
        if Path(path).with_suffix("") == Path("lcq/__init__") and not allowed(n)
    ]


def no_module_is_hidden(path, tree):
    """A package binds the name of one of its modules only to that module, or to what the module is named for."""
    folder, complaints = Path(path).parent, []
    package = ".".join(folder.parts)
    for node in tree.body if Path(path).stem == "__init__" else []:
        names = node.names if isinstance(node, ast.ImportFrom) else []
        bound = {alias.asname or alias.name: f"{node.module or '.'}.{alias.name}" for alias in names}
        bound |= {node.name: "a definition"} if isinstance(node, ast.FunctionDef | ast.ClassDef) else {}
        for name, source in bound.items():
            homes = (f"..{name}", f"{package}.{name}", *([f"{package}.{name}.{name}"] if "." in package else []))
            if is_module(folder / name) and source not in homes:
                complaints.append(f"{name!r} is a module beside it and also {source}; rename the module")
    return complaints


def is_module(path):
    return (REPOSITORY / path).with_suffix(".py").exists() or (REPOSITORY / path / "__init__.py").exists()


CHECKS = [name_says_something, no_optional_import, face_has_no_logic, no_module_is_hidden]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_lcq_keeps_the_house(check):
    files = [*REPOSITORY.glob("lcq/**/*.py"), *REPOSITORY.glob("lcq/**/*.pyi")]
    paths = sorted(path.relative_to(REPOSITORY).as_posix() for path in files)
    trees = {path: ast.parse((REPOSITORY / path).read_text(encoding="utf-8")) for path in paths}
    assert trees and not [f"{path}: {text}" for path, tree in trees.items() for text in check(path, tree)]


def test_the_tree_is_small():
    """At most 10 MB that git tracks; files of nets beyond that are made again by their scripts."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [REPOSITORY / name for name in listed.stdout.split("\0") if name]
    assert sum(path.stat().st_size for path in paths if path.exists()) <= 10e6


def test_files_of_tests_are_short():
    long = [path for path in REPOSITORY.glob("tests/**/*.py") if path.read_text().count("\n") > 500]
    assert not long, "expected at most 500 lines a file; cut it by subject"


# Each of them can fail, and knows what is fine

BAD = [
    (name_says_something, "lcq/utils.py", ""),
    (name_says_something, "lcq/core/forms.py", ""),
    (no_optional_import, "lcq/runtime/packed.py", "try:\n    import torch\nexcept ImportError:\n    torch = None"),
    (face_has_no_logic, "lcq/__init__.py", "import lcq.forms\nx = 1"),
    (face_has_no_logic, "lcq/__init__.pyi", "def table(): ..."),
    (no_module_is_hidden, "lcq/__init__.py", "from lcq.reporting import table as forms"),
    (no_module_is_hidden, "lcq/__init__.pyi", "from .reporting import show as plans"),
    (no_module_is_hidden, "lcq/__init__.py", "def plans(): ..."),
    (no_module_is_hidden, "lcq/training/__init__.py", "from lcq.training.hemp import lc"),
]
GOOD = [
    ("lcq/runtime/packed.py", "try:\n    f()\nexcept ValueError:\n    pass\ntry:\n    import re\nfinally:\n    pass"),
    ("lcq/__init__.py", '"""Doc."""\nfrom lcq.forms import Codes\n__all__ = ["Codes"]'),
    ("lcq/__init__.py", "from lcq import plans\nfrom lcq.plans import Plan"),
    ("lcq/schemes/cast.py", "import re"),
    ("lcq/__init__.py", "def __getattr__(name): ..."),
    ("lcq/training/__init__.py", "from . import lc"),
    ("lcq/training/__init__.py", "from lcq.training.lc import lc"),
]


@pytest.mark.parametrize(("check", "path", "source"), BAD)
def test_check_can_fail(check, path, source):
    assert check(path, ast.parse(source))


def test_every_check_is_seen_to_fail():
    assert {check for check, *_ in BAD} == set(CHECKS)


@pytest.mark.parametrize(("path", "source"), GOOD)
def test_checks_accept_what_is_fine(path, source):
    assert not [text for check in CHECKS for text in check(path, ast.parse(source))]


def banned(path, source):
    command = [
        Path(sys.executable).with_name("ruff"),
        "check",
        "--select",
        "TID251",
        "--no-cache",
        "--stdin-filename",
        path,
        "-",
    ]
    return subprocess.run(command, cwd=REPOSITORY, input=source, capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    "source",
    [
        "import jax\njax.config.update('jax_enable_x64', True)",
        "import jax\njax.config.jax_enable_x64 = True",
        "from jax import config",
        "import jax.experimental\nwith jax.experimental.enable_x64():\n    pass",
        "import jax\nwith jax.enable_x64(True):\n    pass",
        "import os\nos.environ['XLA_FLAGS'] = ''",
        "from os import environ\nenviron.update(XLA_FLAGS='')",
        "import os\nos.putenv('XLA_FLAGS', '')",
        "from jax._src import core",
        "from jax import _src",
        "import jax\njax._src.core.Var",
        "from jax.extend import core",
        "def f():\n    from matplotlib import pyplot",
    ],
)
def test_what_is_banned_is_found(source):
    assert "TID251" in banned("lcq/runtime/packed.py", source) and "TID251" not in banned("tests/test_x.py", source)


def test_what_is_like_the_banned_is_fine():
    source = '"""XLA_FLAGS is the user\'s."""\nimport os\nimport jax\nos.getenv("LCQ_DATA")\njax.extend.linear_util'
    assert "All checks passed" in banned("lcq/runtime/packed.py", source)


def lint_imports(folder, **environment):
    command, settings = [Path(sys.executable).with_name("lint-imports"), "--no-cache"], os.environ | environment
    run = subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True)
    return run.returncode, run.stdout


def test_imports_only_go_down():
    status, told = lint_imports(REPOSITORY)
    assert status == 0, told[-2000:]


ARROWS = {
    "lcq/forms/codes.py": "from lcq.ptq.quantize import quantize",
    "lcq/schemes/levels.py": "from lcq.tree.rules import Rule",
    "lcq/schemes/kmeans/lloyd.py": "from lcq.schemes.kmeans.init import summarise",
    "lcq/ptq/rounding/base.py": "from lcq.ptq.rounding.gpfq import GPFQ",
    "lcq/attic.py": "",
    "benchmarks/micro/cstep.py": "from lcq.training.lc import lc",
}


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """What import-linter says where all of these arrows are."""
    folder = tmp_path_factory.mktemp("house")
    for name in ("lcq", "benchmarks"):
        shutil.copytree(
            REPOSITORY / name,
            folder / name,
            ignore=lambda _, names: {n for n in names if n.count(".") and n[-3:] != ".py"},
        )
    shutil.copy(REPOSITORY / "pyproject.toml", folder)
    for path, line in ARROWS.items():
        with open(folder / path, "a") as file:
            file.write(f"\n{line}\n")
    return lint_imports(folder, PYTHONPATH=str(folder))


@pytest.mark.parametrize("path", ARROWS)
def test_the_order_of_rooms_can_fail(path, broken):
    status, told = broken
    assert status != 0 and path.removesuffix(".py").replace("/", ".") in told, told[-2000:]
