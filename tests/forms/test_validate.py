"""Whose fault a ValueError is: checks are named by leaf at every door, errors of JAX keep their own words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import lcq
from lcq.forms import Cast, Sum
from lcq.forms.validate import finds_fault, named
from lcq.io.records import Encoder
from lcq.io.tree_paths import Leaf
from lcq.layers import binary
from lcq.layers import linen as linen_layers
from lcq.layers import nnx as nnx_layers
from lcq.plans import read_plan
from lcq.ptq import preview


def faulty(*_, **__):
    raise ValueError("expected four, got three")


def broadcasts(*_, **__):
    return jnp.broadcast_to(jnp.ones(3), (4,))


def in_numpy(*_, **__):
    return np.ones(3).reshape(4)


def test_faults_are_those_that_a_check_raises():
    for cause, ours in ((faulty, True), (broadcasts, False), (in_numpy, False)):
        try:
            cause()
        except ValueError as error:
            assert finds_fault(error) == ours
    assert not finds_fault(ValueError("never raised"))


def test_a_place_before_and_a_remedy_behind():
    with pytest.raises(ValueError, match=r"^w: expected four, got three; count again$"), named("w", "; count again"):
        faulty()
    with pytest.raises(ValueError, match="broadcasting") as caught, named("w", "; count again"):
        broadcasts()
    assert "count again" not in str(caught.value)
    with pytest.raises(KeyError, match="1"), named("w"):
        {}[1]


W = np.ones((4, 8), np.float32)


def save(path):
    return lcq.save(path / "net.lcq", {"leaf": Cast(W)})


def load(path):
    return lcq.load(path / "net.lcq")


def encode(_):
    return Encoder().encode(Leaf(("leaf",), "d", Cast(W)))


def encode_sum(_):
    return Encoder().encode(Leaf(("leaf",), "d", Sum((Cast(W),))))


def compress(_):
    return lcq.compress({"leaf": W}, [lcq.Rule("leaf", lcq.KMeans(2))])


def dry_run(_):
    rules = [lcq.Rule("leaf", lcq.Uniform(4, per=4))]
    return lcq.dry_run({"leaf": W}, rules, lambda params, x: x @ params["leaf"], jnp.ones((2, 4)))


def plan(_):
    return read_plan("[[rule]]\npattern = 'x'\nscheme = 'KMeans(2)  # leaf'")


def freeze_nnx(_):
    class Net(nnx.Module):
        def __init__(self):
            self.leaf = nnx_layers.BinaryDense(4, 2, rngs=nnx.Rngs(0))

    return nnx_layers.freeze(Net())


def freeze_linen(_):
    ones = linen.initializers.ones

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen_layers.BinaryDense(2, binarize_kernel=False, kernel_init=ones, name="leaf")(x)

    x = jnp.ones((1, 4))
    return linen_layers.freeze(Net(), Net().init(jax.random.key(0), x), x)


DOORS = {
    "save": (Cast, "pack", save),
    "save, of what is packed": (Cast, "check_stored", encode),
    "save, of a sum": (Cast, "check_stored", encode_sum),
    "load": (Cast, "check_stored", load),
    "compress": (lcq.KMeans, "check", compress),
    "dry_run": (preview, "block_counts", dry_run),
    "a plan": (lcq.KMeans, "__post_init__", plan),
    "nnx": (nnx_layers.BinaryDense, "freeze", freeze_nnx),
    "linen": (binary, "check_binary", freeze_linen),
}


@pytest.mark.parametrize("door", DOORS)
def test_errors_of_jax_are_not_dressed_as_faults_of_a_leaf(tmp_path, monkeypatch, door):
    owner, name, work = DOORS[door]
    save(tmp_path)
    work(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, faulty)
        with pytest.raises(ValueError, match=r"leaf.*: .*expected four, got three"):
            work(tmp_path)
    monkeypatch.setattr(owner, name, broadcasts)
    with pytest.raises(ValueError, match="broadcasting") as caught:
        work(tmp_path)
    assert "leaf" not in str(caught.value)
