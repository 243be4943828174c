"""The house: who may import whom, and the few things no file of lcq does.

Every check is a function of a file's path and syntax tree that returns complaints. The first tests run
them over the repository, the others prove on small sources that each of them can fail.
"""

import ast
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).parents[1]


class Room(NamedTuple):
    """A file or folder of lcq: its floor, the rooms it may import, a folder's files from the ground up."""

    floor: int
    imports: str = ""
    files: str = ""


ROOMS = {
    "dtypes": Room(-1),
    "axes": Room(0),
    "blocks": Room(0, "dtypes"),
    "registry": Room(0),
    "meshes": Room(0),
    "base": Room(1, "axes blocks dtypes registry"),
    "packing": Room(1),
    "unfold": Room(1),
    "forms": Room(2, "base blocks dtypes packing registry", "checks codes cast sparse factors sums restored"),
    "rules": Room(2, "axes base blocks dtypes unfold"),
    "products": Room(2, "jaxprs unfold"),
    "jaxprs": Room(0),
    "joined": Room(1, "jaxprs"),
    "shards": Room(1, "jaxprs"),
    "obstacles": Room(1, "jaxprs"),
    "positions": Room(0),
    "units": Room(3, "obstacles products"),
    "values": Room(3, "joined positions products"),
    "trace": Room(4, "jaxprs joined obstacles positions products rules shards units values"),
    "tree": Room(3, "base forms rules unfold"),
    "schemes": Room(
        3,
        "axes base blocks dtypes forms",
        "cast scales levels uniform lloyd entropy partition histogram exact_kmeans kmeans selection prune lowrank "
        "additive",
    ),
    "kernels": Room(
        3,
        "base dtypes forms jaxprs meshes packing registry unfold",
        "reference laid columns xnor_xla codes_xla lists shards ragged xnor_pallas_tpu xnor_pallas_gpu signs matmul",
    ),
    "methods": Room(
        5,
        "base blocks dtypes forms registry rules products trace tree unfold schemes",
        "given objective coupling lagrangian lc baselines moments alphabet following rounding resolving "
        "descent shrinkage schedule pieces walk batches gathering sums inputs curvature flops layerwise assembly "
        "quantize preview smooth_binary differentiable_entropy hemp ending progress weighing refit",
    ),
    "artifact": Room(
        4,
        "base dtypes forms packing rules tree",
        "paths lanes tables rans rates codec container layouts file shards checkpoint",
    ),
    "moving": Room(4, "base dtypes forms jaxprs kernels packing"),
    "leaf": Room(5, "base dtypes jaxprs joined kernels meshes moving products"),
    "laying": Room(5, "base forms kernels meshes moving"),
    "loops": Room(6, "forms jaxprs kernels leaf"),
    "uses": Room(6, "base dtypes jaxprs joined kernels laying leaf meshes moving products"),
    "run": Room(7, "base dtypes forms jaxprs joined kernels laying leaf loops rules uses"),
    "notation": Room(4, "base rules schemes"),
    "report": Room(5, "artifact axes base forms rules tree"),
    "chart": Room(5),
    "plan": Room(6, "base forms methods rules tree artifact notation report"),
    "hull": Room(0),
    "knapsack": Room(1, "hull"),
    "budget": Room(7, "hull knapsack artifact base rules tree notation report plan"),
    "layers": Room(5, "base dtypes forms meshes registry unfold kernels", "binary frozen linen nnx"),
    "plot": Room(7, "base rules report"),
    "page": Room(7, "base chart rules artifact report"),
    "terminal": Room(7, "report"),
    "__init__": Room(
        8,
        "base blocks dtypes packing unfold forms rules products trace tree schemes kernels methods artifact run "
        "notation report plan budget",
    ),
    "examples": Room(9, "__init__ layers", "data models transformers train"),
    "demo": Room(10, "__init__ examples plot rules report terminal"),
    "inspection": Room(10, "__init__ artifact packing page report terminal"),
    "calibration": Room(10, "artifact methods rules"),
    "cli": Room(11, "__init__ methods artifact rules tree notation report plan terminal demo inspection calibration"),
    "__main__": Room(12, "cli"),
}
"""A file imports only from the rooms named in its row, all on floors below; inside a folder, only from files
listed before it. `__init__` is the face; a folder's own `__init__` is its roof. A row may wait for its file.
"""

BENCHMARKS = ("__init__", "examples")
PARTS = [
    ("trace",),
    ("artifact", "rans"),
    *(("methods", name) for name in ("moments", "rounding", "resolving", "following", "walk")),
    *(("kernels", name) for name in ("columns", "lists", "signs", "matmul", "xnor_pallas_tpu", "xnor_pallas_gpu")),
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
    """(line, (room,) or (folder, file)) of every import from lcq; a folder itself is (folder, "__init__")."""
    for line, module, name in imported_modules(path, tree):
        root, *parts = module.split(".")
        if root != "lcq":
            continue
        if not parts and name in ROOMS:
            parts = [name]
        elif len(parts) == 1 and parts[0] in ROOMS and name in ROOMS[parts[0]].files.split():
            parts.append(name)
        room = parts[0] if parts else "__init__"
        if room in ROOMS and ROOMS[room].files:
            yield line, (room, parts[1] if len(parts) > 1 else "__init__")
        else:
            yield line, (room,)


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


def check_has_a_room(path, tree):
    """Every file is in the table."""
    room, *rest = parts_of(path)
    if room not in ROOMS:
        return [f"{path}: {room!r} is not in ROOMS: give it a floor and say what it may import"]
    files = ["__init__", *ROOMS[room].files.split()] if ROOMS[room].files else []
    if rest and (len(rest) > 1 or rest[0] not in files):
        return [f"{path}: not among the files of {room!r} in ROOMS: list it there, at its height"]
    if files and not rest:
        return [f"{path}: {room!r} is a folder in ROOMS"]
    return []


def check_imports_go_down(path, tree):
    """Only rooms of its row, all of them below; inside a folder only files listed earlier."""
    room, *rest = parts_of(path)
    if room not in ROOMS:
        return []
    own, complaints = ROOMS[room], []
    heights = {name: i for i, name in enumerate([*own.files.split(), "__init__"])}
    for line, (target, *file) in imported_rooms(path, tree):
        if target not in ROOMS:
            complaints.append(f"{path}:{line}: imports {target!r}, which is not in ROOMS")
        elif target == room:
            if not rest or heights.get(file[0], len(heights)) >= heights.get(rest[0], -1):
                complaints.append(f"{path}:{line}: imports {file[0]!r}, which is not listed before it in {room!r}")
        elif ROOMS[target].floor >= own.floor:
            floors = f"floor {ROOMS[target].floor} from floor {own.floor}"
            complaints.append(f"{path}:{line}: imports {target!r}, {floors}: imports only go down")
        elif target not in own.imports.split():
            allowed = own.imports or "nothing of lcq"
            complaints.append(f"{path}:{line}: imports {target!r}; {room!r} may import {allowed}")
    return complaints


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


def check_internal_jax_only_in_trace(path, tree):
    internal = ("jax._src", "jax.extend.core")
    if parts_of(path) in (("jaxprs",), ("trace",)):
        return []
    used = [(line, f"{module}.{name}" if name else module) for line, module, name in imported_modules(path, tree)]
    used += [(node.lineno, dotted(node)) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return [
        f"{path}:{line}: {name}; internal jax names live in jaxprs.py and trace.py only"
        for line, name in used
        if any(name == prefix or name.startswith(f"{prefix}.") for prefix in internal)
    ]


def check_matplotlib_only_in_plot(path, tree):
    if parts_of(path) == ("plot",):
        return []
    lines = [line for line, module, _ in imported_modules(path, tree) if module.split(".")[0] == "matplotlib"]
    return [f"{path}:{line}: imports matplotlib, which only plot.py does" for line in lines]


CHECKS = {name.removeprefix("check_"): f for name, f in list(globals().items()) if name.startswith("check_")}


def face_has_no_logic(path, tree):
    """lcq/__init__.py is a docstring, imports, and names with dunders such as `__all__`."""
    complaints = []
    for node in tree.body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        dunder = isinstance(node, ast.Assign) and all(dotted(name).startswith("__") for name in node.targets)
        if not (docstring or dunder or isinstance(node, ast.Import | ast.ImportFrom)):
            complaints.append(f"{path}:{node.lineno}: the face holds imports only")
    return complaints


def clashes(path, tree, siblings):
    """A package must not bind the name of one of its modules: lcq.NAME would be the one or the other."""
    package = ".".join(Path(path).parts[:-1])
    return [
        f"{path}: {name!r} is a module beside it and also {source}; rename the module"
        for name, source in bound_by(tree).items()
        if name in siblings and source not in (f".{name}", f"{package}.{name}")
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


def test_the_table_itself_goes_down():
    for room, (floor, imports, _) in ROOMS.items():
        for target in imports.split():
            assert ROOMS[target].floor < floor, f"{room!r} may not be given {target!r}: it is not below"


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


# Each check can fail, and knows what is fine

BAD = [
    ("has_a_room", "lcq/attic.py", "", "'attic' is not in ROOMS"),
    ("has_a_room", "lcq/schemes/vector.py", "", "not among the files of 'schemes'"),
    ("has_a_room", "lcq/base/form.py", "", "not among the files of 'base'"),
    ("has_a_room", "lcq/schemes/kmeans/lloyd.py", "", "not among the files of 'schemes'"),
    ("has_a_room", "lcq/schemes.py", "", "is a folder"),
    ("imports_go_down", "lcq/base.py", "from lcq.forms import Codes", "floor 2 from floor 1"),
    ("imports_go_down", "lcq/base.py", "from .forms import Codes", "floor 2 from floor 1"),
    ("imports_go_down", "lcq/base.py", "from . import forms", "floor 2 from floor 1"),
    ("imports_go_down", "lcq/base.py", "import lcq.forms as f", "floor 2 from floor 1"),
    ("imports_go_down", "lcq/base.py", "def f():\n    from lcq import forms", "base.py:2: imports 'forms'"),
    ("imports_go_down", "lcq/forms/codes.py", "from lcq import rules", "floor 2 from floor 2"),
    ("imports_go_down", "lcq/tree.py", "import lcq", "'__init__', floor 8 from floor 3"),
    (
        "imports_go_down",
        "lcq/schemes/kmeans.py",
        "from ..rules import Rule",
        "may import axes base blocks dtypes forms",
    ),
    ("imports_go_down", "lcq/packing.py", "from lcq.attic import x", "not in ROOMS"),
    (
        "imports_go_down",
        "lcq/schemes/kmeans.py",
        "from .additive import x",
        "'additive', which is not listed before",
    ),
    (
        "imports_go_down",
        "lcq/schemes/kmeans.py",
        "from . import additive",
        "'additive', which is not listed before",
    ),
    (
        "imports_go_down",
        "lcq/schemes/levels.py",
        "from lcq.schemes import KMeans",
        "'__init__', which is not",
    ),
    (
        "imports_go_down",
        "lcq/layers/linen.py",
        "from lcq import schemes",
        "may import base dtypes forms meshes registry unfold kernels",
    ),
    (
        "imports_go_down",
        "lcq/cli.py",
        "from lcq.schemes.kmeans import KMeans",
        "may import __init__ methods artifact",
    ),
    ("name_says_something", "lcq/utils.py", "", "'utils' says nothing"),
    ("name_says_something", "lcq/core/forms.py", "", "'core' says nothing"),
    (
        "no_optional_import",
        "lcq/run.py",
        "try:\n    import torch\nexcept ImportError:\n    torch = None",
        ":2:",
    ),
    ("sets_nothing_global", "lcq/run.py", "jax.config.update('jax_enable_x64', True)", "never set"),
    ("sets_nothing_global", "lcq/run.py", "jax.config.jax_enable_x64 = True", "never set"),
    ("sets_nothing_global", "lcq/run.py", "from jax import config", "imports config"),
    ("sets_nothing_global", "lcq/run.py", "with jax.experimental.enable_x64():\n    pass", "never set"),
    ("sets_nothing_global", "lcq/run.py", "os.environ['XLA_FLAGS'] = ''", "never set"),
    ("sets_nothing_global", "lcq/run.py", "os.environ.update(XLA_FLAGS='')", "never set"),
    ("internal_jax_only_in_trace", "lcq/run.py", "from jax._src import core", "jax._src.core"),
    ("internal_jax_only_in_trace", "lcq/run.py", "from jax import _src", "jax._src"),
    ("internal_jax_only_in_trace", "lcq/run.py", "from jax.extend import core", "jax.extend.core"),
    ("internal_jax_only_in_trace", "lcq/run.py", "import jax\njax._src.core.Var", "run.py:2: jax._src"),
    ("matplotlib_only_in_plot", "lcq/cli.py", "def f():\n    from matplotlib import pyplot", "cli.py:2"),
]

GOOD = [
    ("lcq/forms/codes.py", "from lcq import packing\nfrom lcq.base import Form\nfrom ..base import Scheme"),
    ("lcq/schemes/additive.py", "from lcq.schemes.kmeans import lloyd\nfrom . import kmeans"),
    ("lcq/schemes/__init__.py", "from lcq.schemes.kmeans import KMeans"),
    ("lcq/methods/lc.py", "import lcq.tree as tree\nfrom lcq.schemes import KMeans"),
    ("lcq/run.py", "try:\n    f()\nexcept ValueError:\n    pass\ntry:\n    import re\nfinally:\n    pass"),
    ("lcq/run.py", '"""XLA_FLAGS is the user\'s."""\nwide = jax.config.jax_enable_x64\njnp.update(x)'),
    ("lcq/trace.py", "from jax.extend import core"),
    ("lcq/jaxprs.py", "from jax.extend import core"),
    ("lcq/plot.py", "import matplotlib.pyplot as plt\nfrom lcq import report"),
    ("lcq/demo.py", "import lcq\nfrom lcq import plot\nfrom lcq.examples import data"),
    ("lcq/__main__.py", "from lcq.cli import main"),
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
        ("lcq/methods/__init__.py", "from lcq.methods.table import table", True),
        ("lcq/methods/__init__.py", "from . import table", False),
    ],
)
def test_clash_can_fail(path, source, bad):
    assert bool(clashes(path, ast.parse(source), {"__init__", "table"})) == bad


def test_face_and_benchmark_checks_can_fail():
    face = ast.parse('"""Doc."""\nfrom lcq.forms import Codes\n__all__ = ["Codes"]\n')
    assert face_has_no_logic("lcq/__init__.py", face) == []
    assert face_has_no_logic("lcq/__init__.py", ast.parse("import lcq.base\nx = 1"))
    script = "benchmarks/lenet300.py"
    assert benchmark_imports(script, ast.parse("import lcq\nfrom lcq import Rule\nfrom lcq.examples import data")) == []
    assert benchmark_imports(script, ast.parse("from lcq.methods import lc"))
