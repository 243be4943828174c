"""Forms, what is prepacked of them, and optimizer states, through flax.serialization and jax.export."""

import flax.serialization as fs
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lcq
from lcq.forms.base import FORMS, is_form
from lcq.kernels.signs import signs
from lcq.layers import frozen
from lcq.layers.binary import window

RNG = np.random.default_rng(0)
W = jnp.asarray(RNG.normal(size=(8, 6)), jnp.float32)
X = jnp.asarray(RNG.normal(size=(3, 8)), jnp.float32)
SCHEMES = {
    "KMeans": lcq.KMeans(4, per="channel"),
    "Binary": lcq.Binary(scale=True),
    "Ternary": lcq.Ternary(),
    "PowersOfTwo": lcq.PowersOfTwo(2),
    "Levels": lcq.Levels((-1.5, 0.1, 2.0)),
    "Uniform": lcq.Uniform(4, per=4, zero_point=True),
    "Uniform, in steps": lcq.Uniform(4, per=4, zero_point=True, scale_bits=5),
    "Cast": lcq.Cast("bfloat16"),
    "short Cast": lcq.Cast("float8_e4m3fn"),
    "Prune": lcq.Prune(count=9),
    "pruned codes": lcq.Prune(count=9, values=lcq.KMeans(2)),
    "LowRank": lcq.LowRank(2),
    "full rank": lcq.LowRank(6),
    "CodedTrellis": lcq.CodedTrellis(0.05, memory=3),
    "Trellis": lcq.Trellis(2, memory=5, per="channel"),
    "Rotated": lcq.Rotated(lcq.Uniform(3, per="channel"), seed=2),
    "Additive": lcq.Additive(lcq.KMeans(2), lcq.Prune(count=3)),
}


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def exported(fn, *args):
    """The kernel of signs for CPUs names a layout, which JAX promises nothing about."""
    allowed = [jax.export.DisabledSafetyCheck.custom_call("LayoutConstraint")]
    return jax.export.deserialize(jax.export.export(jax.jit(fn), disabled_checks=allowed)(*args).serialize())


def test_every_form_is_here():
    forms = [form for scheme in SCHEMES.values() for form in [scheme.project(W)]]
    assert {type(form).__name__ for form in forms} == set(FORMS)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_forms_of_both_layouts(scheme):
    """Into a target of the same form, and into one of another layout: what comes is what was written."""
    working = scheme.project(W)
    for form in (working, working.pack()):
        for target in (form, scheme.project(-W)):
            back = fs.from_bytes({"w": target}, fs.to_bytes({"w": form}))["w"]
            same(back, form)
            np.testing.assert_array_equal(np.asarray(back.dense()), np.asarray(form.dense()))
            np.testing.assert_array_equal(np.asarray(back.pack().dense()), np.asarray(form.pack().dense()))
        fn = exported(lambda form, x: x @ form.dense(), form, X)
        np.testing.assert_allclose(fn.call(form, X), X @ form.dense(), atol=1e-5)


@pytest.mark.parametrize(
    "scheme",
    [
        lcq.Uniform(4, per=4),
        lcq.KMeans(2),
        lcq.Prune(count=3),
        lcq.Trellis(2, memory=5),
        lcq.CodedTrellis(0.05, memory=3),
    ],
    ids=repr,
)
def test_what_is_prepacked(scheme):
    form = scheme.project(W)
    ready = form.prepack()
    same(fs.from_bytes(ready, fs.to_bytes(ready)), ready)
    np.testing.assert_allclose(
        exported(lambda a, x: x @ a.dense(), ready, X).call(ready, X), X @ form.dense(), atol=1e-5
    )


def test_binary_layers():
    kernel, image = jnp.asarray(RNG.normal(size=(3, 3, 4, 5)), jnp.float32), jnp.ones((1, 5, 5, 4))
    norm = {"mean": jnp.zeros(5), "var": jnp.ones(5)}
    for made in ({}, {"norm": norm}):
        layer = frozen.freeze(kernel, window=window((3, 3), padding=((1, 1), (0, 1))), **made)
        back = fs.from_bytes(layer, fs.to_bytes(layer))
        same(back, layer)
        assert back.window == layer.window
        same(exported(frozen.apply, layer, image).call(layer, image), frozen.apply(layer, image))
    same(fs.from_bytes(signs(W), fs.to_bytes(signs(W))), signs(W))


@pytest.mark.filterwarnings("ignore:the weights are")
@pytest.mark.parametrize("scheme", [*SCHEMES.values(), lcq.LowRank(penalty=1e-3)], ids=[*SCHEMES, "ranks"])
def test_state_through_flax_serialization(scheme):
    """Of `lc`, in a chain, and after a step."""
    params = {"kernel": W, "bias": jnp.zeros(6)}
    tx = optax.chain(lcq.lc(optax.adam(1e-2), [lcq.Rule("kernel", scheme)], mu=0.1, every=1), optax.scale(1.0))
    start = tx.init(params)
    _, state = tx.update(params, start, params)
    back = fs.from_bytes(start, fs.to_bytes(state))
    same(back, state)
    same(lcq.extract(jax.tree.map(jnp.asarray, back), params)["kernel"], lcq.extract(state, params)["kernel"])


def test_states_of_the_other_methods():
    rules, params = [lcq.Rule("kernel", lcq.KMeans(2))], {"kernel": W}
    for tx in (
        lcq.training.iterated_direct(optax.sgd(0.1), rules, every=1),
        lcq.hemp(optax.sgd(0.1), [lcq.Rule("kernel", lcq.KMeans(4))]),
    ):
        state = tx.init(params)
        same(fs.from_bytes(state, fs.to_bytes(state)), state)


def test_a_state_of_another_form_is_refused():
    codes, cast = lcq.KMeans(2).project(W), lcq.Cast("bfloat16").project(W)
    with pytest.raises(ValueError, match="w: expected the state of Cast, got Codes; restore into a tree of such forms"):
        fs.from_bytes({"w": cast}, fs.to_bytes({"w": codes}))
    with pytest.raises(ValueError, match=r"w: expected the state of Codes, got \['kernel'\]"):
        fs.from_bytes({"w": codes}, fs.to_bytes({"w": {"kernel": W}}))


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_dicts_that_were_forms_are_refused(scheme, tmp_path):
    """At every door that would take them for arrays; a tree of the user's own dicts passes."""
    forms = {"net": [{"w": scheme.project(W).pack()}]}
    dicts = fs.msgpack_restore(fs.to_bytes(forms))
    doors = (
        lcq.decompress,
        lambda tree: lcq.packed(lambda p, x: x @ p["net"]["0"]["w"])(tree, X),
        lambda tree: lcq.save(tmp_path / "a.lcq", tree),
        lcq.sizes,
    )
    for door in doors:
        with pytest.raises(
            ValueError, match=r"net/0/w: expected a form, got a dict that was \w+: .* restore into a tree"
        ):
            door(dicts)
    mine = {"values": W, "form": W, "mask": {"values": W, "mask": W}}
    assert lcq.decompress(mine) is not None


@pytest.mark.parametrize("stored", [False, True])
def test_forms_through_orbax(stored, tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    forms = {name.replace(" ", ""): scheme.project(W) for name, scheme in SCHEMES.items()}
    if stored:
        forms = jax.tree.map(lambda form: form.pack(), forms, is_leaf=is_form)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "forms", forms)
        checkpointer.wait_until_finished()
        same(checkpointer.restore(tmp_path / "forms", forms), forms)
        dicts = checkpointer.restore(tmp_path / "forms")
    for name in set(forms) - {"Cast", "shortCast"}:  # these are a dict of `values`, as anyone's may be
        with pytest.raises(
            ValueError, match=f"{name}: expected a form, got a dict that was {type(forms[name]).__name__}"
        ):
            lcq.decompress({name: dicts[name]})


def test_a_mark_that_is_none():
    assert lcq.decompress({"form": np.zeros(3, np.uint8)})["form"].sum() == 0
