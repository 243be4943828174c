"""The house: what no file of lcq does, beside the order of the rooms, which import-linter keeps (`pyproject.toml`).

Every check is a function of a file's path and syntax tree that returns complaints. The first tests run
them over the repository, the others prove on small sources that each of them can fail.
"""

import ast
import os
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


BENCHMARKS = ("__init__", "examples")
PARTS = [
    ("tracing", "param_flow"),
    ("io", "entropy_coding"),
    *(("ptq", name) for name in ("rounding", "statistics", "two_stream")),
    *(("kernels", name) for name in ("columns", "ell", "signs", "api", "pallas_tpu", "pallas_gpu")),
    ("layers", "nnx"),
]
VAGUE = {"utils", "util", "misc", "common", "helpers", "helper", "core", "tools"}
ENVIRONMENT = {"XLA_FLAGS", "JAX_ENABLE_X64", "JAX_PLATFORMS", "JAX_DEFAULT_MATMUL_PRECISION"}


# Reading a file


def parts_of(path):
    """("schemes", "kmeans") of lcq/schemes/kmeans.py, ("base",) of lcq/base.py."""
    return Path(path).with_suffix("").parts[1:]


def imported_modules(path, tree):
    """(line, full name, what is taken from it or None) of every import at any depth; no name is relative."""
    package = Path(path).parts[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*above, *filter(None, [node.module])))
            yield from ((node.lineno, module, alias.name) for alias in node.names)


def imported_rooms(path, tree):
    """(line, (room, file)) of every import from lcq; the face is ("__init__",)."""
    for line, module, name in imported_modules(path, tree):
        root, *parts = module.split(".")
        if root == "lcq":
            whole = (*parts, name) if name and (REPOSITORY / "lcq" / "/".join((*parts, name))).exists() else parts
            whole = (
                (*parts, name) if name and (REPOSITORY / "lcq" / ("/".join((*parts, name)) + ".py")).exists() else whole
            )
            yield line, tuple(whole[:2]) or ("__init__",)


def dotted(node):
    """ "jax.config.update" of the expression that reads so; "" of any other."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted(node.value)):
        return f"{base}.{node.attr}"
    return ""


def bound_by(tree):
    """Names a package's `__init__` takes from modules: {name: where it is from}."""
    names = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module or ''}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names[node.name] = "a definition"
    return names


# The checks


def check_name_says_something(path, tree):
    return [f"{path}: {part!r} says nothing about what is in it" for part in parts_of(path) if part in VAGUE]


def check_no_optional_import(path, tree):
    """`try: import` hides a dependency; import plainly, where it is needed."""
    tries = [node for node in ast.walk(tree) if isinstance(node, ast.Try | ast.TryStar) and node.handlers]
    inside = [inner for node in tries for statement in node.body for inner in ast.walk(statement)]
    lines = {node.lineno for node in inside if isinstance(node, ast.Import | ast.ImportFrom)}
    return [f"{path}:{line}: an import inside `try`" for line in sorted(lines)]


def check_sets_nothing_global(path, tree):
    """jax.config, XLA_FLAGS and 64 bits are the user's."""
    complaints = []
    for line, module, name in imported_modules(path, tree):
        if (module, name) == ("jax", "config") or module == "jax.config" or name == "enable_x64":
            complaints.append(f"{path}:{line}: imports {name or module}; jax's settings are the user's")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            found = dotted(node.func) == "jax.config.update" or ENVIRONMENT & {k.arg for k in node.keywords}
        elif isinstance(node, ast.Attribute):
            setting = isinstance(node.ctx, ast.Store) and dotted(node.value) == "jax.config"
            found = setting or (node.attr == "enable_x64" and dotted(node).startswith("jax."))
        else:
            found = isinstance(node, ast.Constant) and node.value in ENVIRONMENT
        if found:
            complaints.append(f"{path}:{node.lineno}: jax.config, XLA_FLAGS and x64 are never set here")
    return complaints


def check_internal_jax_only_in_tracing(path, tree):
    internal = ("jax._src", "jax.extend.core")
    if parts_of(path) in (("tracing", "jaxpr"), ("tracing", "param_flow")):
        return []
    used = [(line, f"{module}.{name}" if name else module) for line, module, name in imported_modules(path, tree)]
    used += [(node.lineno, dotted(node)) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return [
        f"{path}:{line}: {name}; internal jax names live in tracing/jaxpr.py and tracing/param_flow.py only"
        for line, name in used
        if any(name == prefix or name.startswith(f"{prefix}.") for prefix in internal)
    ]


def check_matplotlib_only_in_figures(path, tree):
    if parts_of(path) == ("examples", "figures"):
        return []
    lines = [line for line, module, _ in imported_modules(path, tree) if module.split(".")[0] == "matplotlib"]
    return [f"{path}:{line}: imports matplotlib, which only examples/figures.py does" for line in lines]


CHECKS = {name.removeprefix("check_"): f for name, f in list(globals().items()) if name.startswith("check_")}


def face_has_no_logic(path, tree):
    """lcq/__init__.py is a docstring, imports, and names with dunders such as `__all__`."""
    complaints = []
    for node in tree.body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        dunder = isinstance(node, ast.Assign) and all(dotted(name).startswith("__") for name in node.targets)
        lazy = isinstance(node, ast.FunctionDef) and node.name in ("__getattr__", "__dir__")
        if not (docstring or dunder or lazy or isinstance(node, ast.Import | ast.ImportFrom)):
            complaints.append(f"{path}:{node.lineno}: the face holds imports only")
    return complaints


def clashes(path, tree, siblings):
    """A package must not bind the name of one of its modules: lcq.NAME would be the one or the other."""
    package = ".".join(Path(path).parts[:-1])

    def homes(name):
        """The module itself; in a namespace also the thing that a module is named for, which is all it is for."""
        return (f".{name}", f"{package}.{name}", *((f"{package}.{name}.{name}",) if "." in package else ()))

    return [
        f"{path}: {name!r} is a module beside it and also {source}; rename the module"
        for name, source in bound_by(tree).items()
        if name in siblings and source not in homes(name)
    ]


def benchmark_imports(path, tree):
    """Benchmarks, like users, see the face; and the examples, and parts that are timed on their own."""
    rooms = [(line, room) for line, room in imported_rooms(path, tree) if tuple(room[:2]) not in PARTS]
    found = [(line, room[0]) for line, room in rooms if room[0] not in BENCHMARKS]
    return [f"{path}:{line}: imports {room!r}; benchmarks import lcq and lcq.examples" for line, room in found]


# Over the repository


def read(path):
    return ast.parse((REPOSITORY / path).read_text(encoding="utf-8"), filename=path)


def files(pattern):
    return sorted(p.relative_to(REPOSITORY).as_posix() for p in REPOSITORY.glob(pattern))


def test_imports_only_go_down():
    run = subprocess.run(["lint-imports", "--no-cache"], cwd=REPOSITORY, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:]


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("forms/codes.py", "from lcq.ptq.quantize import quantize"),
        ("schemes/levels.py", "from lcq.tree.rules import Rule"),
        ("schemes/kmeans/lloyd.py", "from lcq.schemes.kmeans.init import summarise"),
        ("ptq/rounding/base.py", "from lcq.ptq.rounding.gpfq import GPFQ"),
        ("attic.py", ""),
    ],
)
def test_the_order_of_rooms_can_fail(path, line, tmp_path):
    shutil.copytree(REPOSITORY / "lcq", tmp_path / "lcq", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    with open(tmp_path / "lcq" / path, "a") as file:
        file.write(f"\n{line}\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    run = subprocess.run(["lint-imports", "--no-cache"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode != 0 and (path.split("/")[-1].removesuffix(".py") in run.stdout), run.stdout[-2000:]


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_lcq_keeps_the_house(check):
    complaints = [text for path in files("lcq/**/*.py") for text in check(path, read(path))]
    assert not complaints, "\n" + "\n".join(complaints)


def test_face_has_no_logic():
    complaints = [text for path in files("lcq/__init__.py") for text in face_has_no_logic(path, read(path))]
    assert not complaints, "\n" + "\n".join(complaints)


def test_no_module_shares_a_name_with_what_its_package_exports():
    complaints = []
    for path in files("lcq/**/__init__.py"):
        folder = REPOSITORY / Path(path).parent
        siblings = {p.stem for p in folder.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
        complaints += clashes(path, read(path), siblings)
    assert not complaints, "\n" + "\n".join(complaints)


def test_benchmarks_use_the_face():
    complaints = [text for path in files("benchmarks/**/*.py") for text in benchmark_imports(path, read(path))]
    assert not complaints, "\n" + "\n".join(complaints)


def test_the_tree_is_small():
    """At most 10 MB that git tracks; files of nets beyond that are made again by their scripts."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [REPOSITORY / name for name in listed.stdout.split("\0") if name]
    assert sum(path.stat().st_size for path in paths if path.exists()) <= 10e6


# Each check can fail, and knows what is fine

BAD = [
    ("name_says_something", "lcq/utils.py", "", "'utils' says nothing"),
    ("name_says_something", "lcq/core/forms.py", "", "'core' says nothing"),
    (
        "no_optional_import",
        "lcq/runtime/packed.py",
        "try:\n    import torch\nexcept ImportError:\n    torch = None",
        ":2:",
    ),
    ("sets_nothing_global", "lcq/runtime/packed.py", "jax.config.update('jax_enable_x64', True)", "never set"),
    ("sets_nothing_global", "lcq/runtime/packed.py", "jax.config.jax_enable_x64 = True", "never set"),
    ("sets_nothing_global", "lcq/runtime/packed.py", "from jax import config", "imports config"),
    ("sets_nothing_global", "lcq/runtime/packed.py", "with jax.experimental.enable_x64():\n    pass", "never set"),
    ("sets_nothing_global", "lcq/runtime/packed.py", "os.environ['XLA_FLAGS'] = ''", "never set"),
    ("sets_nothing_global", "lcq/runtime/packed.py", "os.environ.update(XLA_FLAGS='')", "never set"),
    ("internal_jax_only_in_tracing", "lcq/runtime/packed.py", "from jax._src import core", "jax._src.core"),
    ("internal_jax_only_in_tracing", "lcq/runtime/packed.py", "from jax import _src", "jax._src"),
    ("internal_jax_only_in_tracing", "lcq/runtime/packed.py", "from jax.extend import core", "jax.extend.core"),
    ("internal_jax_only_in_tracing", "lcq/runtime/packed.py", "import jax\njax._src.core.Var", "packed.py:2: jax._src"),
    ("matplotlib_only_in_figures", "lcq/cli/main.py", "def f():\n    from matplotlib import pyplot", "main.py:2"),
]

GOOD = [
    ("lcq/runtime/packed.py", "try:\n    f()\nexcept ValueError:\n    pass\ntry:\n    import re\nfinally:\n    pass"),
    ("lcq/runtime/packed.py", '"""XLA_FLAGS is the user\'s."""\nwide = jax.config.jax_enable_x64\njnp.update(x)'),
    ("lcq/tracing/param_flow.py", "from jax.extend import core"),
    ("lcq/tracing/jaxpr.py", "from jax.extend import core"),
    ("lcq/examples/figures.py", "import matplotlib.pyplot as plt\nfrom lcq import reporting"),
    ("lcq/cli/demo.py", "import lcq\nfrom lcq.examples import data, figures"),
]


@pytest.mark.parametrize(("check", "path", "source", "complaint"), BAD)
def test_check_can_fail(check, path, source, complaint):
    found = CHECKS[check](path, ast.parse(source))
    assert any(complaint in text for text in found), found


def test_every_check_is_seen_to_fail():
    assert {check for check, *_ in BAD} == set(CHECKS)


@pytest.mark.parametrize(("path", "source"), GOOD)
def test_checks_accept_what_is_fine(path, source):
    assert [text for check in CHECKS.values() for text in check(path, ast.parse(source))] == []


@pytest.mark.parametrize(
    ("path", "source", "bad"),
    [
        ("lcq/__init__.py", "from lcq.table import table", True),
        ("lcq/__init__.py", "from .report import show as table", True),
        ("lcq/__init__.py", "def table(): ...", True),
        ("lcq/__init__.py", "from lcq import table\nfrom lcq.table import rows", False),
        ("lcq/training/__init__.py", "from lcq.training.paper import table", True),
        ("lcq/training/__init__.py", "from . import table", False),
        ("lcq/training/__init__.py", "from lcq.training.table import table", False),
    ],
)
def test_clash_can_fail(path, source, bad):
    assert bool(clashes(path, ast.parse(source), {"__init__", "table"})) == bad


def test_face_and_benchmark_checks_can_fail():
    face = ast.parse('"""Doc."""\nfrom lcq.forms import Codes\n__all__ = ["Codes"]\n')
    assert face_has_no_logic("lcq/__init__.py", face) == []
    assert face_has_no_logic("lcq/__init__.py", ast.parse("import lcq.forms\nx = 1"))
    script = "benchmarks/experiments/lenet300.py"
    assert benchmark_imports(script, ast.parse("import lcq\nfrom lcq import Rule\nfrom lcq.examples import data")) == []
    assert benchmark_imports(script, ast.parse("from lcq.training.lc import lc"))
