"""Formats of numbers: the nearest one in each, of which dtype sums are, and the order of bytes."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import lcq
from lcq.forms.dtypes import FORMATS, format_name, native, nearest_number, wider
from lcq.io.checkpoints import checkpoint

SHORT = [name for name in FORMATS if name not in ("float32", "float64")]
W = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)


def numbers_of(name):
    """All finite numbers of a format, ascending, in float64."""
    dtype = np.dtype(name)
    count, kind = (1 << 16, np.uint16) if dtype.itemsize == 2 else (1 << min(8, ml_dtypes.finfo(dtype).bits), np.uint8)
    wide = np.arange(count).astype(kind).view(dtype).astype(np.float64)
    return np.unique(wide[np.isfinite(wide)])


@pytest.mark.parametrize("name", SHORT)
@pytest.mark.parametrize("compiled", [False, True])
def test_nearest_number_is_the_nearest_of_all(name, compiled):
    there = numbers_of(name)
    middles = ((there[1:] + there[:-1]) / 2).astype(np.float32)
    beside = [np.nextafter(middles, np.float32(side)) for side in (-np.inf, np.inf)]
    x = np.concatenate([there.astype(np.float32), middles, *beside, np.float32([0, 1e5, -1e5, 3.4e38, -3.4e38, -1])])
    x = x[(x == 0) | (np.abs(x) > 1.2e-38)]  # XLA on CPUs takes what is smaller for zero
    cast = jax.jit(nearest_number, static_argnums=1) if compiled else nearest_number
    y = np.asarray(cast(jnp.asarray(x), name)).astype(np.float64)
    at = np.clip(np.searchsorted(there, x.astype(np.float64)), 1, len(there) - 1)
    least = np.minimum(*(np.abs(there[i] - x.astype(np.float64)) for i in (at - 1, at)))
    assert np.isfinite(y).all()
    np.testing.assert_allclose(np.abs(y - x), least, rtol=1e-12)


@pytest.mark.parametrize("name", SHORT)
def test_numbers_of_a_format_are_themselves(name):
    x = numbers_of(name)[1:]
    wide = jnp.asarray(x, jnp.float32)
    same = np.asarray(nearest_number(wide, name)).astype(np.float64)
    small = np.abs(x) < 1.2e-38  # flushed to zero by XLA on CPUs
    np.testing.assert_array_equal(same[~small], x[~small])


def test_what_is_not_finite_stays_so():
    x = nearest_number(jnp.array([jnp.inf, -jnp.inf, jnp.nan]), "bfloat16").astype(jnp.float32)
    assert x[0] == jnp.inf and x[1] == -jnp.inf and jnp.isnan(x[2])


def test_wider_casts_change_no_bit():
    x = jnp.array([1e-45, 3e38, jnp.inf, -0.0])
    assert nearest_number(x, "float32") is not None and (nearest_number(x, "float32") == x).all()
    assert nearest_number(x.astype(jnp.bfloat16), "float32").dtype == jnp.float32


def test_casts_of_every_scheme_and_form_go_to_the_nearest_number():
    x = jnp.array([[500.0, 1.0], [2.0, -3e5]])
    wanted = [[448.0, 1.0], [2.0, -448.0]]
    for scheme in (lcq.Cast("float8_e4m3fn"), lcq.Prune(count=4, values="float8_e4m3fn")):
        assert scheme.project(x).dense().tolist() == wanted
        assert scheme.project(x).pack().dense().tolist() == wanted
    for scheme in (lcq.KMeans(4), lcq.LowRank(2), lcq.Prune(count=4), lcq.Additive(lcq.KMeans(4), lcq.Prune(count=1))):
        form = scheme.project(x)
        narrow = type(form)(**{**{f: getattr(form, f) for f in form.__dataclass_fields__}, "dtype": "float8_e4m3fn"})
        np.testing.assert_allclose(np.asarray(narrow.dense(), np.float32), wanted, rtol=0.07)


def test_files_keep_the_nearest_number(tmp_path):
    forms = lcq.compress({"a": jnp.array([500.0, -1.0])}, [lcq.Rule("a", lcq.Cast("float8_e4m3fn"))])
    lcq.save(tmp_path / "a.lcq", forms)
    assert lcq.load(tmp_path / "a.lcq")["a"].dense().tolist() == [448.0, -1.0]


@pytest.mark.parametrize("given", ["bf16", "int8", "float6_e2m3fn", jnp.int32, 3])
def test_unknown_formats_name_those_there_are(given):
    with pytest.raises(ValueError, match=r"expected a floating-point format, one of .*bfloat16.*float8_e4m3fn"):
        format_name(given)


@pytest.mark.parametrize("make", [lambda: lcq.Cast("bf16"), lambda: lcq.Prune(count=1, values="bf16")])
def test_schemes_name_the_formats_there_are(make):
    with pytest.raises(ValueError, match=r"one of .*bfloat16.*, got 'bf16'"):
        make()


def test_wider_knows_all_formats():
    for name in SHORT:
        assert wider(name, jnp.float32) == np.float32 and wider(name) == np.dtype(name)
    assert wider("bfloat16", "float16") == np.float32 == wider("float8_e5m2", "float8_e4m3fn")
    assert wider(jnp.float64, jnp.bfloat16) == np.float64 and wider(jnp.complex64, np.float64) == np.complex128
    assert wider(jnp.int32, jnp.float16) == np.float16 and wider(jnp.int8) == np.float32


def test_arrays_of_the_other_byte_order():
    other, rules = {"k": W.astype(">f4")}, [lcq.Rule("k", lcq.KMeans(2))]
    same = lcq.decompress(lcq.compress({"k": W}, rules))["k"]
    np.testing.assert_array_equal(lcq.decompress(lcq.compress(other, rules))["k"], same)


@pytest.mark.parametrize("order", [">", "<"])
def test_every_door_takes_either_byte_order(order, tmp_path):
    kind = f"{order}f4"
    scheme, rules = lcq.Uniform(4, per="channel"), [lcq.Rule("k", lcq.Uniform(4, per="channel"))]
    w, x = W.astype(kind), np.ones((8, 3), np.float32).astype(kind)
    tree, net = {"k": w}, lambda p, x: x @ p["k"]
    plain = lcq.compress({"k": W}, rules)
    np.testing.assert_array_equal(scheme.project(w).dense(), plain["k"].dense())
    weighted = lcq.compress(tree, rules, importance={"k": np.ones((3, 1), kind)})
    np.testing.assert_allclose(weighted["k"].dense(), plain["k"].dense(), atol=1e-6)
    tx = lcq.lc(optax.sgd(0.1), rules, mu=0.1, every=2)
    state = tx.init(tree)
    updates, state = tx.update({"k": np.zeros((3, 4), kind)}, state, tree)
    np.testing.assert_allclose(lcq.extract(state, tree)["k"].dense(), plain["k"].dense(), atol=1e-6)
    assert np.isfinite(updates["k"]).all()
    done = lcq.quantize(net, tree, [x], rules).forms
    native_done = lcq.quantize(net, {"k": W}, [np.ones((8, 3), np.float32)], rules).forms
    np.testing.assert_array_equal(done["k"].dense(), native_done["k"].dense())
    run = lcq.packed(lambda p, x: net(p, x) + p["b"])
    biased, wanted = plain | {"b": np.ones(4, kind)}, jnp.ones((8, 3)) @ plain["k"].dense() + 1
    for ready in (biased, run.prepack(biased, x)):
        np.testing.assert_allclose(run(ready, x), wanted, atol=1e-5)
    assert [use.how for use in run.report(biased, x)] == ["product"]
    assert lcq.dry_run(tree, rules, net, x).total.bits == lcq.sizes(done)["k"].bits
    np.testing.assert_array_equal(
        lcq.ptq.curvature(net, tree, [x], rules)["k"],
        lcq.ptq.curvature(net, {"k": W}, [np.asarray(x, "f4")], rules)["k"],
    )
    lcq.save(tmp_path / "a.lcq", {"k": w})
    np.testing.assert_array_equal(lcq.load(tmp_path / "a.lcq")["k"], W)
    np.savez(tmp_path / "a.npz", k=w)
    read = checkpoint.read(tmp_path / "a.npz")["k"]
    assert read.dtype == np.float32 and read.dtype.isnative
    for suffix in (".npz", ".safetensors"):
        checkpoint.write(tmp_path / f"b{suffix}", tree)
        np.testing.assert_array_equal(checkpoint.read(tmp_path / f"b{suffix}")["k"], W)


def test_native_leaves_everything_else_alone():
    for thing in (W, jnp.ones(2), 3, None, "text"):
        assert native(thing) is thing
