"""Trees of qwix become forms of the same codes; and folders of orbax, of its v1 and managers too."""

import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcq.forms import Codes
from lcq.io import from_qwix, read


def codes_of(dtype, low, high):
    rng = np.random.default_rng(0)
    return rng.integers(low, high, (8, 4)).astype(dtype), rng.normal(size=(2, 4)).astype(np.float32)


CASES = [(jnp.int4, -8, 8), (jnp.int8, -128, 128), (jnp.uint4, 0, 16)]


@pytest.mark.parametrize(("dtype", "low", "high"), CASES)
@pytest.mark.parametrize("shifted", [False, True])
def test_values_and_codes(dtype, low, high, shifted):
    q, scale = codes_of(dtype, low, high)
    zero = np.arange(8).reshape(2, 4).astype(dtype) % 7 if shifted else None
    expected = (q.astype(np.float64) - (0 if zero is None else np.repeat(zero.astype(int), 4, 0))) * np.repeat(
        scale, 4, 0
    )
    array = {"qvalue": q, "scale": scale, "qtype": q.dtype.name} | ({"zero_point": zero} if shifted else {})
    inner = types.SimpleNamespace(qvalue=jnp.asarray(q), scale=scale, zero_point=zero, qtype=dtype)
    as_object = types.SimpleNamespace(array=inner)
    for given in ({"kernel": array}, {"kernel": {"array": array}}, {"kernel": as_object}):
        form = from_qwix({"dense": given, "bias": scale})["dense"]["kernel"]
        np.testing.assert_allclose(form.dense(), expected, rtol=1e-6)
        np.testing.assert_array_equal(np.asarray(form.unpack().codes, int), q.astype(int) - low)


def test_what_is_no_grid():
    q, scale = codes_of(np.float32, 0, 1)
    with pytest.raises(ValueError, match=r"dense/kernel: expected codes of int2, .*got float32"):
        from_qwix({"dense": {"kernel": {"qvalue": q, "scale": scale}}})
    with pytest.raises(ValueError, match=r"k: expected scales that divide \[8, 4\], got \[3, 4\]"):
        from_qwix({"k": {"qvalue": q.astype(np.int8), "scale": np.ones((3, 4))}})
    plain = {"a": [np.ones(2), None], "scale": np.ones(3)}
    assert jax.tree.structure(from_qwix(plain)) == jax.tree.structure(plain)


@pytest.mark.parametrize("kind", ["nf4", None])
def test_levels_that_are_kept_as_codes_of_uint4(kind):
    """qwix's nf4: taken for a grid they would be 28 times as large."""
    q, scale = codes_of(jnp.uint4, 0, 16)
    with pytest.raises(ValueError, match=f"k: expected the qtype 'uint4' of codes of uint4, got {kind!r}, and nf4"):
        from_qwix({"k": {"qvalue": q, "scale": scale, "qtype": kind}})


def test_folders_of_orbax(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    q, scale = codes_of(jnp.int4, -8, 8)
    tree = {"kernel": {"array": {"qvalue": jnp.asarray(q), "scale": scale}}, "bias": np.ones(3, np.float32)}
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        manager.save(5, args=ocp.args.StandardSave(tree))
    found = read(tmp_path / "run" / "5", forms=True)
    assert isinstance(found["kernel"], Codes)
    np.testing.assert_array_equal(found["kernel"].dense(), q.astype(np.float32) * np.repeat(scale, 4, 0))
    np.testing.assert_array_equal(read(tmp_path / "run" / "5")["kernel"]["array"]["qvalue"].astype(int), q.astype(int))


def test_folders_of_orbax_v1(tmp_path):
    v1 = pytest.importorskip("orbax.checkpoint.experimental.v1")
    v1.save_pytree(tmp_path / "net", {"w": jnp.arange(3.0), "layers": [jnp.ones(2)]})
    found = read(tmp_path / "net")
    np.testing.assert_array_equal(found["w"], np.arange(3, dtype=np.float32))
    np.testing.assert_array_equal(found["layers"][0], np.ones(2, np.float32))


def test_damaged_folders_of_orbax(tmp_path):
    """What orbax makes of them, a KeyError or worse, is said as of other files."""
    ocp = pytest.importorskip("orbax.checkpoint")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "gone", {"w": np.ones((3, 4))})
    shutil.rmtree(tmp_path / "gone" / "d")
    shutil.rmtree(tmp_path / "gone" / "ocdbt.process_0")
    for name in ("empty", "text"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "_METADATA").write_text("{}" if name == "empty" else "{")
    for name in ("gone", "empty", "text"):
        with pytest.raises(ValueError, match=f"{name}: not an orbax checkpoint of a tree, or damaged: .*get it again"):
            read(tmp_path / name)
