"""`compress_to` writes what `compress` and `save` write, a leaf and a part of it at a time."""

import jax.numpy as jnp
import numpy as np
import pytest

import lcq
from lcq.io import compressing
from lcq.io.compressing import project_in_parts
from lcq.tree import resolve
from tests.io.files import same


def params():
    rng = np.random.default_rng(0)
    return {
        "a": jnp.asarray(rng.normal(size=(64, 24)), jnp.bfloat16),
        "b": rng.normal(size=(8, 8)).astype(np.float32),
        "c": rng.normal(size=(8, 4)).astype(np.float32),
        "d": [None, np.arange(3)],
    }


RULES = [lcq.Rule("[bc]", lcq.KMeans(4), joint=True), lcq.Rule("a", lcq.Uniform(4, per=8))]


@pytest.mark.parametrize("most", [None, 700])
def test_the_same_net_as_compress_and_save(tmp_path, monkeypatch, most):
    seen = []
    forms = lcq.compress(params(), RULES)
    expected = lcq.save(tmp_path / "one.lcq", forms, max_shard_bytes=most, plan=lcq.Plan(RULES))
    size = lcq.compress_to(
        tmp_path / "two.lcq",
        params(),
        RULES,
        max_shard_bytes=most,
        plan=lcq.Plan(RULES),
        progress=lambda *call: seen.append(call),
    )
    same(lcq.load(tmp_path / "two.lcq"), lcq.load(tmp_path / "one.lcq"))
    assert size == expected or most is not None
    assert seen == [(i, 5, name) for i, name in enumerate(["a", "b", "c", "d/0", "d/1"], 1)]
    assert lcq.read_plan(tmp_path / "two.lcq") == lcq.Plan(RULES)
    monkeypatch.setattr(compressing, "_PART", 64)
    lcq.compress_to(tmp_path / "two.lcq", params(), RULES)
    for a, b in zip(*(lcq.load(tmp_path / name)["a"].unpack().codes for name in ("one.lcq", "two.lcq")), strict=True):
        assert (np.asarray(a) != np.asarray(b)).mean() < 0.01


@pytest.mark.parametrize(
    "scheme",
    [
        lcq.Uniform(4, per=8),
        lcq.KMeans(4, per="channel"),
        lcq.Ternary(per=(4, 3)),
        lcq.Uniform(2, per=8, zero_point=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("most", [1, 100, 500, 10**6])
def test_parts_are_those_of_the_whole(scheme, most):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(24, 30)), jnp.float32)
    (task,) = resolve([lcq.Rule("w", scheme)], {"w": x})
    (whole,), (parts,) = task.project((x,)), project_in_parts(task, (x,), most)
    assert type(parts) is type(whole) and parts.shape == whole.shape
    np.testing.assert_allclose(parts.dense(), whole.dense(), rtol=1e-5, atol=1e-5)
    assert (np.asarray(parts.unpack().codes) != np.asarray(whole.codes)).mean() < 0.01
    parts.pack().check_stored()


def test_leaves_that_are_read_when_they_are_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(compressing, "_PART", 64)
    tree = {name: np.asarray(w) for name, w in params().items() if name != "d"} | {"e": np.ones(3, np.float32)}
    lcq.io.write(tmp_path / "w.safetensors", tree)
    lazy = lcq.io.read(tmp_path / "w.safetensors", lazy=True)
    lcq.compress_to(tmp_path / "lazy.lcq", lazy, RULES)
    lcq.compress_to(tmp_path / "net.lcq", tree, RULES)
    assert (tmp_path / "lazy.lcq").read_bytes() == (tmp_path / "net.lcq").read_bytes()


def test_what_has_something_in_common_is_projected_whole():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(24, 30)), jnp.float32)
    for rule in (
        lcq.Rule("w", lcq.KMeans(4)),
        lcq.Rule("w", lcq.KMeans(4, per=8, rate=0.1)),
        lcq.Rule("w", lcq.Prune(fraction=0.2)),
        lcq.Rule("w", lcq.Uniform(4), stacked=1),
    ):
        (task,) = resolve([rule], {"w": x})
        (whole,), (parts,) = task.project((x,)), project_in_parts(task, (x,), 8)
        np.testing.assert_array_equal(parts.dense(), whole.dense())


def test_errors_are_those_of_compress(tmp_path):
    with pytest.raises(ValueError, match="b: expected finite weights, got 1 NaN"):
        lcq.compress_to(tmp_path / "n.lcq", params() | {"b": np.array([[np.nan]], np.float32)}, RULES)
    with pytest.raises(ValueError, match="rule 'x' matches no leaf"):
        lcq.compress_to(tmp_path / "n.lcq", params(), [lcq.Rule("x", lcq.Binary())])
    with pytest.raises(ValueError, match="d/1: expected an array, a number or None, got str"):
        lcq.compress_to(tmp_path / "n.lcq", params() | {"d": [None, "text"]}, RULES)
    assert list(tmp_path.iterdir()) == []
