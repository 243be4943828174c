"""Distillation: its losses against numpy in float64, its solutions against normal equations, on forms of quantize."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lcq
from lcq.training.distill import divergence, relative_error

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(200, 6)).astype(np.float32)
W = RANDOM.normal(size=(6, 4)).astype(np.float32)
PARAMS = {"kernel": W, "bias": np.ones(4, np.float32)}


def affine(params, x):
    return x @ params["kernel"] + params["bias"]


def softmax(a):
    e = np.exp(a.astype(np.float64) - a.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_divergence_is_that_of_kullback_and_leibler(temperature):
    a, b = RANDOM.normal(size=(2, 3, 5, 4)).astype(np.float32) * 3
    p, q = softmax(a / temperature), softmax(b / temperature)
    expected = temperature**2 * (p * np.log(p / q)).sum(-1).mean()
    assert float(divergence(jnp.array(a), jnp.array(b), temperature)) == pytest.approx(expected, rel=1e-5)


def test_relative_error_is_over_all_outputs():
    a, b = ({"u": RANDOM.normal(size=(3, 2)).astype(np.float32), "v": np.full(4, c, np.float32)} for c in (1.0, 2.0))
    flat = [np.concatenate([t["u"].ravel(), t["v"]]).astype(np.float64) for t in (a, b)]
    expected = ((flat[0] - flat[1]) ** 2).sum() / (flat[0] ** 2).sum()
    assert float(relative_error(a, b)) == pytest.approx(expected, rel=1e-6)
    assert float(relative_error(jnp.zeros(2), jnp.ones(2))) == 2.0


def test_values_are_matched_as_well_as_the_codes_allow():
    forms = lcq.compress(PARAMS, [lcq.Rule("kernel", lcq.KMeans(3, per="channel"))])
    codes = np.asarray(forms["kernel"].unpack().codes)
    tx = optax.adam(optax.cosine_decay_schedule(0.05, 500))
    tuned = lcq.decompress(lcq.distill(affine, PARAMS, forms, tx, [X] * 500, outputs="values"))
    wanted, got = (np.asarray(affine(p, X), np.float64) for p in (PARAMS, tuned))
    for j in range(4):  # each output alone: the inputs summed by code, and the bias
        design = np.stack([X[:, codes[:, j] == k].sum(1, dtype=np.float64) for k in range(3)] + [np.ones(len(X))], 1)
        least = np.linalg.lstsq(design, wanted[:, j], rcond=None)[1][0]
        assert ((got - wanted)[:, j] ** 2).sum() == pytest.approx(least, rel=1e-3)


def test_logits_of_a_quantized_net_come_nearer_and_codes_stay():
    done = lcq.quantize(affine, PARAMS, [X], [lcq.Rule("kernel", lcq.Uniform(2, per="channel"))])
    tuned = lcq.distill(affine, PARAMS, done.forms, optax.adam(1e-2), [X] * 100)
    before, after = (
        float(divergence(jnp.asarray(affine(PARAMS, X)), affine(lcq.decompress(f), X))) for f in (done.forms, tuned)
    )
    assert after < 0.9 * before
    np.testing.assert_array_equal(tuned["kernel"].unpack().codes, done.forms["kernel"].unpack().codes)


def test_a_teacher_in_bfloat16_and_batches_of_numpy():
    forms = lcq.compress(PARAMS, [lcq.Rule("kernel", lcq.Uniform(4))])
    low = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), PARAMS)
    losses = []
    lcq.distill(affine, low, forms, optax.adam(1e-3), [X] * 3, on_step=lambda n, v: losses.append(float(v)))
    assert len(losses) == 3 and np.isfinite(losses).all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"outputs": "labels"}, "outputs="),
        ({"temperature": 0.0}, "temperature > 0"),
        ({"temperature": float("inf")}, "finite temp"),
        ({"steps": 0}, "steps >= 1"),
    ],
)
def test_settings_are_checked(settings, words):
    forms = lcq.compress(PARAMS, [lcq.Rule("kernel", lcq.Uniform(4))])
    with pytest.raises(ValueError, match=words):
        lcq.distill(affine, PARAMS, forms, optax.sgd(0.1), [X], **settings)


@pytest.mark.parametrize("params", [PARAMS | {"kernel": W[:, :2]}, {"kernel": W}, PARAMS | {"scale": np.ones(4)}])
def test_the_net_before_compression_has_to_be_the_same(params):
    forms = lcq.compress(PARAMS, [lcq.Rule("kernel", lcq.Uniform(4))])
    with pytest.raises(ValueError, match=r"(kernel|bias|scale): expected the net before compression"):
        lcq.distill(affine, params, forms, optax.sgd(0.1), [X])


def test_classes_that_are_left_out_count_for_nothing():
    """Logits of -inf: p log p/q was 0 (inf - inf), and the run NaN from the first update on."""
    kept = np.array([True, True, False, True])
    forms = lcq.compress(PARAMS, [lcq.Rule("kernel", lcq.Uniform(2, per="channel"))])
    runs = []
    for function in (lambda p, x: jnp.where(kept, affine(p, x), -jnp.inf), lambda p, x: affine(p, x)[:, kept]):
        losses = []
        tuned = lcq.distill(
            function, PARAMS, forms, optax.adam(1e-2), [X] * 3, on_step=lambda n, v, to=losses: to.append(v)
        )
        runs.append((tuned["bias"], losses))
    np.testing.assert_allclose(*(np.asarray(losses) for _, losses in runs), rtol=1e-5)
    np.testing.assert_allclose(*(np.asarray(bias)[kept] for bias, _ in runs), rtol=1e-5)


def test_positions_that_a_mask_sets_to_zero_count_for_nothing():
    """Padding of any content: the run is that without it, its loss the same sum over more positions."""
    forms = lcq.compress(PARAMS, [lcq.Rule("kernel", lcq.Uniform(2, per="channel"))])
    padded = {"x": np.concatenate([X, np.full((56, 6), 9.0, np.float32)]), "counts": np.arange(256) < 200}
    masked = (lambda p, b: affine(p, b["x"]) * b["counts"][:, None], padded)
    runs = []
    for function, batch in ((affine, X), masked):
        losses = []
        tuned = lcq.distill(
            function, PARAMS, forms, optax.adam(1e-2), [batch] * 3, on_step=lambda n, v, to=losses: to.append(float(v))
        )
        runs.append((tuned["bias"], losses))
    (bias, losses), (of_padded, of_more) = runs
    np.testing.assert_allclose(of_padded, bias, rtol=1e-4)
    np.testing.assert_allclose(of_more, np.array(losses) * 200 / 256, rtol=1e-4)


def test_whole_numbers_among_outputs_do_not_count():
    forms = lcq.compress(PARAMS, [lcq.Rule("kernel", lcq.Uniform(2))])
    losses = []
    for function in (affine, lambda p, x: {"y": affine(p, x), "ids": jnp.arange(1000)}):
        lcq.distill(
            function, PARAMS, forms, optax.sgd(0.1), [X], outputs="values", on_step=lambda n, v: losses.append(v)
        )
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-6)


@pytest.mark.parametrize(
    ("function", "batches", "outputs", "words"),
    [
        (
            lambda p, x: affine(p, x).argmax(-1),
            [X],
            "logits",
            "expected one array of logits .* int32.*return that alone$",
        ),
        (lambda p, x: affine(p, x).argmax(-1), [X], "values", "expected floating-point outputs"),
        (lambda p, x: {"y": affine(p, x)}, [X], "logits", 'expected one array of logits .*, or say outputs="values"'),
        (affine, X, "logits", r"expected an iterable of batches, got one array \[200, 6\]; pass \[batch\] \* steps"),
        (affine, {"x": X}, "logits", "expected an iterable of batches, got one dict"),
        (affine, [], "logits", "expected at least one batch, got 0"),
    ],
)
def test_what_would_train_nothing(function, batches, outputs, words):
    """Labels have no slope, and rows of one batch would be taken for batches."""
    forms = lcq.compress(PARAMS, [lcq.Rule("kernel", lcq.Uniform(2))])
    with pytest.raises(ValueError, match=words):
        lcq.distill(function, PARAMS, forms, optax.sgd(0.1), batches, outputs=outputs)
