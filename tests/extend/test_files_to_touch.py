"""How many files a new scheme, form, rounding method, kernel, format or codec touches, inside lcq.

Each is added to a copy of the tree as CONTRIBUTING.md says; the copy keeps its order of imports and knows them all.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
MOST = {
    "a scheme": 4,
    "a form": 6,
    "a rounding method": 4,
    "a kernel": 4,
    "a checkpoint format": 3,
    "an export format": 3,
    "a codec": 3,
}
SOURCES = {
    "lcq/schemes/halved.py": """
import dataclasses
from lcq.forms import Cast
from lcq.schemes.base import SCHEMES, Scheme

@SCHEMES.register("Halved")
@dataclasses.dataclass(frozen=True)
class Halved(Scheme):
    def check(self, shape):
        pass
    def solve(self, xs, previous, mu, weights=None):
        return tuple(Cast(x / 2, dtype=str(x.dtype)) for x in xs)
""",
    "lcq/forms/twice.py": """
from typing import Any
import jax
from lcq.forms.base import Form, leafwise, register_form

@register_form
class Twice(Form):
    half: Any = leafwise()
    shape = property(lambda self: self.half.shape)
    bits = property(lambda self: 32 * self.half.size)
    def dense(self):
        return 2 * self.half
    def pack(self):
        return jax.device_get(self)
    def unpack(self):
        return self
    def check_stored(self):
        pass
""",
    "lcq/ptq/rounding/same.py": """
import dataclasses
from lcq.ptq.rounding.base import ROUNDING_METHODS, Rounding

@ROUNDING_METHODS.register("same")
@dataclasses.dataclass(frozen=True)
class Same(Rounding):
    def prepare(self, w, statistics):
        return w
    def solve(self, prepared, form, key=None):
        return form
""",
    "lcq/kernels/at_once.py": """
from lcq.kernels.base import KERNELS, Kernel

@KERNELS.register("at once")
class AtOnce(Kernel):
    def check(self, form):
        pass
    def product(self, x, form):
        return x @ form.dense()
""",
    "lcq/io/checkpoints/npy.py": """
import numpy as np
from lcq.io.checkpoints.base import CHECKPOINT_FORMATS, Checkpoint, CheckpointFormat

@CHECKPOINT_FORMATS.register("npy")
class Npy(CheckpointFormat):
    suffix = ".npy"
    def read(self, path):
        return Checkpoint({"w": np.load(path)}, {})
""",
    "lcq/io/exports/counts.py": """
import numpy as np
from lcq.io.exports.base import EXPORT_FORMATS, Encoded, ExportFormat, Tensor

@EXPORT_FORMATS.register("counts")
class Counts(ExportFormat):
    suffix = ".txt"
    def declare(self, item):
        return {item.name: Tensor((), "count", 0)}
    def encode(self, item):
        return Encoded({item.name: np.asarray(item.value.shape)}, "a count")
    def write(self, path, tensors, arrays):
        path.write_text(str(sum(int(a.prod()) for _, a in arrays)))
        return ()
""",
    "lcq/io/codecs/bare.py": """
import numpy as np
from lcq.io.codecs.base import CODECS, Codec

@CODECS.register("bare")
class Bare(Codec):
    def encode(self, array, codes):
        return np.frombuffer(array.tobytes(), np.uint8)
    def memory(self, stream, size):
        return 0
    def decode(self, data, stream, on_device):
        return data.view(stream.struct.dtype).reshape(stream.struct.shape)
""",
}
LAYERS = {  # what pyproject.toml says of the folder: the new file beside another
    "schemes": ('"additive | cast', '"additive | halved | cast'),
    "forms": ('"cast | columns |', '"cast | twice | columns |'),
    "rounding": ('"gpfq | gptq', '"gpfq | same | gptq'),
    "kernels": ('"code_product | ell', '"at_once | code_product | ell'),
}
PROGRAM = """
import numpy as np, jax.numpy as jnp, lcq
from lcq.forms.twice import Twice
from lcq.plans.text import parse_rule
w = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(8, 6)), jnp.float32)}
net = lambda p, x: x @ p["w"]
half = lcq.compress(w, [parse_rule("w=Halved")])["w"]
form = Twice(half.values, dtype="float32")
lcq.save("net.lcq", {"w": form}, codecs=["bare"])
back = lcq.load("net.lcq")
assert type(back["w"]) is Twice and (back["w"].dense() == w["w"]).all()
assert jnp.allclose(lcq.kernels.matmul(jnp.eye(8), back["w"], kernel="at once"), w["w"], atol=1e-6)
done = lcq.quantize(net, w, [jnp.eye(8)], [lcq.Rule("w", lcq.Uniform(4))], "same")
assert done.records[0].method == "Same()"
lcq.io.export(w, "net.txt", format="counts")
assert open("net.txt").read() == "48"
np.save("net.npy", np.asarray(w["w"]))
assert (lcq.io.read("net.npy")["w"] == w["w"]).all()
"""


def rows():
    """For each kind the files that its row of the table names."""
    text = (REPOSITORY / "CONTRIBUTING.md").read_text()
    lines = [line.split("|")[1:-1] for line in text.splitlines() if re.match(r"\| an? ", line)]
    named = re.compile(r"`((?:lcq|tests)/[\w/.]+|pyproject.toml)`")
    return {kind.strip(): named.findall("".join(cells)) for kind, *cells in lines}


@pytest.mark.parametrize("kind", MOST)
def test_the_table_names_few_files_that_exist(kind):
    named = rows()[kind]
    assert 3 <= len(set(named)) <= MOST[kind], named
    for path in named:
        found = REPOSITORY / path
        assert found.parent.is_dir() if "NAME" in path else found.exists(), path


def test_one_of_each_is_added_by_the_files_of_the_table(tmp_path):
    shutil.copytree(REPOSITORY / "lcq", tmp_path / "lcq", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(
        REPOSITORY / "benchmarks",
        tmp_path / "benchmarks",
        ignore=lambda _, names: [name for name in names if "." in name and not name.endswith(".py")],
    )
    settings = (REPOSITORY / "pyproject.toml").read_text()
    named = [path for kind in MOST for path in rows()[kind]]
    for path, source in SOURCES.items():
        folder, name = Path(path).parent, Path(path).stem
        (tmp_path / path).write_text(source)
        with open(tmp_path / folder / "__init__.py", "a") as file:
            file.write(f"\nfrom {'.'.join(folder.parts)} import {name} as {name}\n")
        assert {f"{folder}/NAME.py", f"{folder}/__init__.py"} <= set(named)
        if (change := LAYERS.get(folder.name)) is not None:
            assert settings.count(change[0]) == 1
            settings = settings.replace(*change)
    (tmp_path / "pyproject.toml").write_text(settings)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    for command in ([Path(sys.executable).with_name("lint-imports"), "--no-cache"], [sys.executable, "-c", PROGRAM]):
        run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout[-1500:] + run.stderr[-1500:]
