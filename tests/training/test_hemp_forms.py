"""The end of a run of hemp: trained levels stay, a fit keeps codes, lost leaves are named; against numpy."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lcq
from lcq.forms import Codes
from lcq.forms.base import is_form
from lcq.training.block_entropy import codes_of, levels_of, nearest

RNG = np.random.default_rng(0)
W = np.asarray(RNG.normal(size=(8, 6)), np.float32)
SCHEMES = {
    "k-means": lcq.KMeans(4),
    "fixed": lcq.KMeans(3, fixed=(0.0,)),
    "rate": lcq.KMeans(4, rate=0.05),
    "channels": lcq.KMeans(3, per="channel"),
    "grid": lcq.Uniform(2),
    "zero point": lcq.Uniform(2, per=4, zero_point=True),
    "levels": lcq.Levels((-1.0, 0.0, 1.0)),
}


def ran(scheme, moved, **rule):
    """A state whose levels are those of W, and parameters that have moved since."""
    params = {"w": jnp.asarray(W), "b": jnp.ones(2)}
    tx = lcq.hemp(optax.sgd(0.1), [lcq.Rule("w", scheme, **rule)], order=1, small=0)
    return tx.init(params), params | {"w": jnp.asarray(moved, jnp.float32)}


def extracted(state, params, **settings):
    """The forms in the working layout."""
    forms = lcq.extract(state, params, **settings)
    return jax.tree.map(lambda leaf: leaf.unpack() if is_form(leaf) else leaf, forms, is_leaf=is_form)


def levels_by_weight(form):
    """Every weight's codebook, [*leaf, K], by dense() of constant codes."""
    rows = []
    for k in range(form.size_of_table):
        codes = jnp.full(W.shape, k, form.codes.dtype)
        rows.append(np.asarray(Codes(codes, form.levels, form.scale, form.zero, form.values).dense()))
    return np.stack(rows, -1)


@pytest.mark.parametrize("name", SCHEMES)
def test_the_levels_of_the_training_are_those_of_the_file(name):
    moved = 0.3 * W + RNG.normal(size=W.shape) / 50  # gathered: a codebook fitted anew would be another
    state, params = ran(SCHEMES[name], moved)
    form = extracted(state, params)["w"]
    trained = levels_by_weight(lcq.compress({"w": jnp.asarray(W)}, [lcq.Rule("w", SCHEMES[name])])["w"])
    np.testing.assert_allclose(levels_by_weight(form), trained, rtol=1e-6)
    best = np.abs(np.float32(moved)[..., None] - trained)
    chosen = np.abs(np.float32(moved) - np.asarray(form.dense()))
    np.testing.assert_allclose(chosen, best.min(-1), atol=1e-6)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_fit_keeps_the_codes_and_is_the_least_squares_one(name):
    moved = 0.6 * W + RNG.normal(size=W.shape) / 20
    state, params = ran(SCHEMES[name], moved)
    plain, fitted = (extracted(state, params, levels=kind)["w"] for kind in ("trained", "fitted"))
    np.testing.assert_array_equal(plain.codes, fitted.codes)
    codes, x = np.asarray(plain.codes), np.asarray(params["w"], np.float64)
    wanted = np.asarray(plain.dense(), np.float64)
    if name in ("k-means", "rate", "fixed"):
        for k in np.unique(codes):
            if name != "fixed" or wanted[codes == k][0] != 0:
                wanted[codes == k] = x[codes == k].mean()
    if name == "channels":
        for j in range(W.shape[1]):
            for k in np.unique(codes[:, j]):
                here = codes[:, j] == k
                wanted[here, j] = x[here, j].mean()
    if name in ("grid", "zero point"):
        rows = [slice(0, 4), slice(4, 8)] if name == "zero point" else [slice(0, 8)]
        columns = [slice(j, j + 1) for j in range(6)] if name == "zero point" else [slice(0, 6)]
        for row in rows:
            for column in columns:
                step = wanted[row, column]
                wanted[row, column] = step * ((x[row, column] * step).sum() / max((step * step).sum(), 1e-30))
    coarse = fitted.scale is not None and fitted.scale.dtype == jnp.bfloat16
    np.testing.assert_allclose(fitted.dense(), wanted, rtol=1e-2 if coarse else 1e-5, atol=1e-5)
    after, before = (np.sum((x - np.asarray(form.dense(), np.float64)) ** 2) for form in (fitted, plain))
    assert coarse or after <= before * (1 + 1e-6)


def test_a_fit_of_leaves_that_share_their_levels():
    params = {"a": jnp.asarray(W), "b": jnp.asarray(W[:3] + 0.1)}
    tx = lcq.hemp(optax.sgd(0.1), [lcq.Rule("a|b", lcq.KMeans(2), joint=True)], order=1, small=0)
    moved = {"a": 0.5 * params["a"], "b": 0.4 * params["b"]}
    forms = extracted(tx.init(params), moved, levels="fitted")
    codes = np.concatenate([np.asarray(forms[name].codes).ravel() for name in "ab"])
    x = np.concatenate([np.asarray(moved[name]).ravel() for name in "ab"])
    means = [x[codes == k].mean() for k in (0, 1)]
    for name in "ab":
        np.testing.assert_allclose(forms[name].levels.ravel(), means, rtol=1e-5)
        assert forms[name].shared == "a"


def test_a_fit_of_stacked_layers_in_bfloat16():
    params = {"w": jnp.asarray(np.stack([W, 2 * W]), jnp.bfloat16)}
    tx = lcq.hemp(optax.sgd(0.1), [lcq.Rule("w", lcq.KMeans(2), stacked=1)], order=1, small=0)
    form = extracted(tx.init(params), params, levels="fitted")["w"]
    assert form.dtype == "bfloat16" and form.dense().dtype == jnp.bfloat16
    for layer in (0, 1):
        codes, x = np.asarray(form.codes[layer]), np.asarray(params["w"][layer], np.float32)
        np.testing.assert_allclose(form.levels[layer].ravel(), [x[codes == k].mean() for k in (0, 1)], rtol=1e-2)


def test_entropy_that_was_paid_for_stays():
    """Weights that gathered on one level: fitted anew, the codebook would split them, and the file would grow."""
    gathered = np.where(np.abs(W) > 1.8, W, 0.4 + 0.02 * W)
    state, params = ran(lcq.KMeans(4), gathered)

    def most(form):
        return np.bincount(np.asarray(form.codes).ravel()).max() / W.size

    anew = lcq.compress(params, [lcq.Rule("w", lcq.KMeans(4))])["w"]
    for levels in ("trained", "fitted"):
        assert most(extracted(state, params, levels=levels)["w"]) > most(anew) + 0.1


def test_a_leaf_that_lost_its_weights_is_named():
    state, params = ran(lcq.KMeans(4), 1e-3 * W)
    with pytest.warns(
        UserWarning, match=r"nearly all weights are on one level, .*: w \(100.0%\).*lower entropy_weight="
    ):
        forms = extracted(state, params)
    assert len(np.unique(forms["w"].codes)) == 1
    tx = lcq.hemp(optax.sgd(0.1), [lcq.Rule("w", lcq.KMeans(4))], order=1, small=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lcq.metrics(state)["collapsed"] == 0
        _, after = jax.jit(tx.update)(params, state, params | {"w": jnp.asarray(W)})
        sound = lcq.metrics(after)
        extracted(after, params | {"w": jnp.asarray(W)})
    codes = np.abs(W[..., None] - np.asarray(after.codebooks[0][0].levels).ravel()).argmin(-1)
    np.testing.assert_allclose(sound["largest_share"], np.bincount(codes.ravel()).max() / W.size, rtol=1e-6)
    assert sound["collapsed"] == 0 and 0 < sound["entropy"] <= 2
    _, after = tx.update(params, state, params)
    with pytest.warns(UserWarning, match=r"on one level, .*: w \(100.0%\)"):
        lost = lcq.metrics(after)
    assert lost["largest_share"] == 1 and lost["collapsed"] == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert jax.jit(lcq.metrics)(after)["collapsed"] == 1  # in a trace nothing can be looked at


def blocks_alike(codes, order):
    """The share of the most common block, by counting."""
    many = codes.size // order
    _, counts = np.unique(codes.reshape(-1)[: many * order].reshape(many, order), axis=0, return_counts=True)
    return counts.max() / many


@pytest.mark.parametrize(("order", "layout"), [(2, "jax"), (3, "jax"), (2, "torch")])
def test_a_leaf_that_repeats_one_block_is_lost(order, layout):
    """No level has more than half of its weights, and H_n is that of a constant leaf."""
    pattern = np.resize(np.arange(order), 96).astype(np.float32)
    pattern[[5, 40, 41]] += 1 - 2 * (pattern[[5, 40, 41]] > 0)  # three weights off
    w = pattern.reshape(8, 12) if layout == "jax" else pattern.reshape(12, 8).T
    params, rules = {"w": jnp.asarray(w)}, [lcq.Rule("w", lcq.KMeans(order))]
    tx = lcq.hemp(optax.sgd(0.0), rules, order=order, small=0, layout=layout, entropy_weight=0, error_weight=0)
    _, state = tx.update(params, tx.init(params), params)
    wanted = blocks_alike(pattern, order)
    np.testing.assert_allclose(lcq.metrics(state)["largest_share"], wanted, rtol=1e-6)
    assert wanted > 0.9 and lcq.metrics(state)["collapsed"] == 0
    clean = np.resize(np.arange(order), 96).astype(np.float32)
    clean = {"w": jnp.asarray(clean.reshape(8, 12) if layout == "jax" else clean.reshape(12, 8).T)}
    with pytest.warns(UserWarning, match=r"repeating block of codes: w \(100.0%\)"):
        lcq.extract(state, clean)
    _, state = tx.update(clean, state, clean)
    with pytest.warns(UserWarning, match=r"w \(100.0%\)"):
        assert lcq.metrics(state)["collapsed"] == 1 and abs(state.entropy) < 1e-6


def test_channels_that_gathered_on_levels_of_their_own_are_lost_too():
    state, params = ran(lcq.KMeans(3, per="channel"), np.tile(W[:1], (8, 1)))
    with pytest.warns(UserWarning, match=r"w \(100.0%\)"):
        extracted(state, params)


def test_metrics_of_both_methods_at_once():
    params = {"w": jnp.asarray(W)}
    rules = [lcq.Rule("w", lcq.KMeans(2))]
    tx = optax.chain(lcq.hemp(lcq.lc(optax.sgd(0.1), rules, mu=1.0, every=2), rules, order=1, small=0))
    found = lcq.metrics(tx.init(params))
    assert {"gap", "penalty_weight", "c_steps", "entropy", "largest_share", "collapsed"} <= set(found)
    both = jax.vmap(tx.init)({"w": jnp.stack([params["w"], 2 * params["w"]])})
    assert lcq.metrics(both)["largest_share"].shape == (2,)
    with pytest.raises(ValueError, match=r"expected one HEMP state .* got 2"):
        lcq.metrics((tx.init(params), lcq.hemp(optax.sgd(0.1), rules, order=1, small=0).init(params)))


def test_a_negative_scale_counts_levels_downwards():
    grid = (-2.0, -1.0, 0.0, 1.0)
    codes = jnp.asarray(RNG.integers(0, 4, (4, 6)), jnp.uint8)
    scale = jnp.asarray([[0.5, -0.25, 1.0, -2.0, 0.5, 0.5]])
    form = Codes(codes, None, scale, None, grid)
    levels = np.asarray(levels_of("w", form))
    assert (np.diff(levels, axis=-1) > 0).all()
    ranks, goal = nearest(form.dense(), jnp.asarray(levels))
    np.testing.assert_array_equal(codes_of(form, ranks), codes)
    np.testing.assert_allclose(goal, form.dense())
