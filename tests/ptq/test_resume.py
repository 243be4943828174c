"""A run that was killed goes on: the same bytes, nothing rounded twice, and no folder of another run is taken."""

import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lcq
from lcq.ptq.resume import description
from tests.ptq.small_net import RULES, SIZE, UNIFORM, bare, draw, net, problem, quantize


class Killed(Exception):
    """What ends a run."""


def killed_after(products):
    def progress(number, many, record):
        if number == products:
            raise Killed

    return progress


def saved_bytes(folder, done):
    lcq.save(folder / "net.lcq", done.forms)
    return (folder / "net.lcq").read_bytes()


def stack(p, x):
    """Layers of a scan, a head in groups, and a bias that follows."""
    x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]
    return x @ p["v"] + p["b"]


STACK = {"w": draw(3, SIZE, SIZE), "v": draw(SIZE, 4), "b": draw(4)}
STACK_RULES = [lcq.Rule("w", UNIFORM), lcq.Rule("v", lcq.KMeans(4, per="channel"))]


@pytest.mark.parametrize("after", [1, 3, 4])
def test_a_killed_run_goes_on(tmp_path, after, monkeypatch):
    given = (stack, STACK, [draw(30, SIZE), draw(20, SIZE)], STACK_RULES, bare("qronos"))
    whole = lcq.quantize(*given)
    with pytest.raises(Killed):
        lcq.quantize(*given, resume=tmp_path / "run", progress=killed_after(after))
    rounded, plain = [], sys.modules["lcq.ptq.quantize"].round_product

    def counted(*args, **settings):
        rounded.append(args)
        return plain(*args, **settings)

    monkeypatch.setattr(sys.modules["lcq.ptq.quantize"], "round_product", counted)
    done = lcq.quantize(*given, resume=tmp_path / "run")
    assert len(rounded) == 4 - after
    assert saved_bytes(tmp_path, done) == saved_bytes(tmp_path, whole)
    assert [r._replace(seconds=0) for r in done.records] == [r._replace(seconds=0) for r in whole.records]
    again = lcq.quantize(*given, resume=tmp_path / "run")  # all of it is there
    assert len(rounded) == 4 - after and again.records == done.records


PARAMS, BATCHES = problem()
OTHERS = {  # what differs from the run in the folder, and what is named
    "rules": ({"rules": [lcq.Rule("w.", lcq.Uniform(4, per="channel"))]}, "rules differ"),
    "method": ({"method": bare("gptq")}, "method differ"),
    "a leaf": ({"params": PARAMS | {"b1": PARAMS["b1"] + 1}}, "params b1 differ"),
    "a batch": ({"batches": [BATCHES[0], BATCHES[1] * 2]}, "batch 1 differ"),
    "batches": ({"batches": BATCHES[:1]}, "batch 1 differ"),
    "mask": ({"mask": lambda x: np.arange(30) < 20}, "function, batch 0, batch 1 differ"),
    "function": ({"fn": lambda p, x: jax.nn.relu(x @ p["w1"] + p["b1"]) @ p["w2"]}, "function differ"),
    "bias_correction": ({"bias_correction": False}, "bias_correction differ"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("resume") / "run"
    quantize(resume=made)
    return made


@pytest.mark.parametrize("case", OTHERS)
def test_folders_of_other_runs_are_refused(folder, case):
    settings, said = OTHERS[case]
    with pytest.raises(ValueError, match=rf"resume=.*this folder is of, got another: {said}; give a new"):
        quantize(resume=folder, **settings)


def test_forms_that_differ_in_their_levels_alone_are_others():
    codes = jnp.zeros((2, 2), jnp.uint8)
    one, other = (lcq.forms.Codes(codes, values=(-1.0, last)) for last in (1.0, 2.0))
    runs = [description([], {"w": form}, [], {})["params w"] for form in (one, other, one)]
    assert runs[0] == runs[2] != runs[1]


def test_a_damaged_file_is_named(tmp_path):
    quantize(resume=tmp_path / "run")
    file = tmp_path / "run" / "00001.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"00001\.safetensors: not a safetensors file, or damaged"):
        quantize(resume=tmp_path / "run")


def test_a_file_of_another_program_is_named(folder, tmp_path):
    run = shutil.copytree(folder, tmp_path / "run")
    lcq.io.write(run / "00001.safetensors", {"w": np.ones(2)})
    with pytest.raises(
        ValueError, match=r"00001\.safetensors: expected the outcome at .*, got a file of another program"
    ):
        quantize(resume=run)


def test_a_folder_that_says_nothing_of_its_run_is_named(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"rules": "')
    with pytest.raises(ValueError, match=r"run\.json: damaged, .*; remove the folder"):
        quantize(resume=tmp_path / "run")
    with pytest.raises(ValueError, match="expected a folder, or none yet, got a file"):
        quantize(resume=tmp_path / "run" / "run.json")


def test_the_same_function_made_anew_is_no_other(folder):
    def again(p, x):
        return net(p, x)

    assert quantize(again, resume=folder, rules=list(RULES)).records[0].path == "w1"
