"""Forms on a mesh have the numbers that they had, and lie as their leaf does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import lcq
from lcq.forms.placement import place
from lcq.tree import resolve

SCHEMES = [
    lcq.KMeans(4),
    lcq.KMeans(4, per="channel"),
    lcq.Uniform(4, per=4),
    lcq.Uniform(3, per="channel", zero_point=True),
    lcq.Prune(fraction=0.3),
    lcq.LowRank(rank=3),
    lcq.Cast("bfloat16"),
    lcq.Additive(lcq.KMeans(2), lcq.Prune(count=9)),
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_placed_forms_are_the_same(scheme):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    w = jnp.asarray(np.random.default_rng(0).normal(size=(16, 8)), jnp.float32)
    (form,) = resolve([lcq.Rule("w", scheme)], {"w": w})[0].project((w,))
    for onto in (NamedSharding(mesh, P("x", "y")), NamedSharding(mesh, P(None, "x")), NamedSharding(mesh, P())):
        placed = place(form.pack(), onto)
        np.testing.assert_allclose(placed.dense(), form.dense(), rtol=1e-6, atol=1e-6)
        for array in jax.tree.leaves(placed):
            assert array.sharding.mesh == mesh
            if array.shape == w.shape:
                assert array.sharding.is_equivalent_to(onto, 2)
    assert jax.tree.leaves(place(form, SingleDeviceSharding(jax.devices()[3])))[0].devices() == {jax.devices()[3]}


def test_tables_lie_with_their_blocks_where_these_divide():
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    form = lcq.Uniform(4, per=4).project(jnp.ones((16, 8))).pack()
    assert place(form, NamedSharding(mesh, P("x", "y"))).scale.sharding.spec == P("x", "y")
    assert place(form, NamedSharding(mesh, P(("x", "y")))).scale.sharding.is_fully_replicated
    assert place(np.arange(8), NamedSharding(mesh, P("x"))).sharding.spec == P("x")


def test_shardings_that_fit_no_file(tmp_path):
    onto = SingleDeviceSharding(jax.devices()[0])
    lcq.save(tmp_path / "net.lcq", {"a": np.ones(3), "b": [None, 2]})
    back = lcq.load(tmp_path / "net.lcq", shardings={"a": onto, "b": [None, onto]})
    assert isinstance(back["a"], jax.Array) and back["b"][0] is None
    assert isinstance(lcq.load(tmp_path / "net.lcq", shardings=onto)["b"][1], jax.Array)
    with pytest.raises(ValueError, match=r"shardings= has no b/1 \(1 of 2 leaves\); give a sharding or None"):
        lcq.load(tmp_path / "net.lcq", shardings={"a": onto})
    with pytest.raises(ValueError, match=r"the file has no c \(1 of 3 leaves\)"):
        lcq.load(tmp_path / "net.lcq", shardings={"a": onto, "b": [None, onto], "c": onto})
    with pytest.raises(ValueError, match="a: expected a sharding or None in shardings=, got int"):
        lcq.load(tmp_path / "net.lcq", shardings={"a": 3})
