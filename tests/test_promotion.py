"""lcq under the settings that users choose to find mistakes of their own: strict promotion, 64 bits, short formats."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lcq
from lcq.forms.dtypes import own_promotion
from lcq.ptq import transforms

SCHEMES = [
    lcq.KMeans(4),
    lcq.KMeans(4, per="channel"),
    lcq.KMeans(3, fixed=(0.0,)),
    lcq.Uniform(4, per=4),
    lcq.Uniform(4, zero_point=True),
    lcq.Ternary(),
    lcq.Prune(count=9),
    lcq.NofM(1, 2),
    lcq.Prune(count=9, values=lcq.KMeans(2)),
    lcq.LowRank(2),
    lcq.Additive(lcq.KMeans(2), lcq.Prune(count=3)),
]
W = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(8, 6)), jnp.float32)}
X = jnp.asarray(np.random.default_rng(1).normal(size=(32, 8)), jnp.float32)


def net(params, x):
    return x @ params["kernel"]


@pytest.fixture
def strict():
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_schemes_and_forms(strict, scheme):
    rules = [lcq.Rule("kernel", scheme)]
    forms = lcq.compress(W, rules)
    stored = forms["kernel"].pack()
    np.testing.assert_allclose(stored.dense(), forms["kernel"].dense())
    tx = lcq.lc(optax.sgd(0.1), rules, mu=0.1, every=2)
    state = tx.init(W)
    _, state = tx.update(W, state, W)
    assert jnp.isfinite(lcq.extract(lcq.training.c_step(state, W), W)["kernel"].dense()).all()


@pytest.mark.parametrize("scheme", [SCHEMES[1], SCHEMES[3], SCHEMES[6], SCHEMES[9]], ids=str)
def test_packed_functions(strict, scheme):
    forms, run = lcq.compress(W, [lcq.Rule("kernel", scheme)]), lcq.packed(net)
    wanted = X @ forms["kernel"].dense()
    for tree in (forms, run.prepack(forms, X)):
        np.testing.assert_allclose(run(tree, X), wanted, atol=1e-4)


GRID = lcq.Uniform(4, per="channel")


@pytest.mark.parametrize(
    ("method", "scheme"),
    [("gpfq", GRID), ("gptq", GRID), ("descent", GRID), (lcq.ptq.RTN(search=False, shrink=0.0), lcq.Rotated(GRID))],
    ids=str,
)
def test_methods_of_quantize(strict, method, scheme):
    done = lcq.quantize(net, W, [X], [lcq.Rule("kernel", scheme)], method=method)
    assert jnp.isfinite(done.forms["kernel"].dense()).all()


@pytest.mark.parametrize("transform", [transforms.equalize, transforms.activation_aware, transforms.rotate])
def test_transforms_before_quantize(strict, transform):
    def two(params, x):
        return jax.nn.relu(x @ params["a"]) @ params["b"]

    params = {"a": W["kernel"], "b": W["kernel"].T}
    more = {"grid": 2} if transform is transforms.activation_aware else {}
    done = transform(two, params, [X], [lcq.Rule("a|b", GRID)], **more)
    np.testing.assert_allclose(two(done.params, X), two(params, X), rtol=1e-3, atol=1e-3)


def test_strict_promotion(strict):
    """Wrappers of optimizers, too."""
    rules = [lcq.Rule("kernel", lcq.KMeans(2))]
    wrapped = [
        lcq.lc(optax.sgd(0.1), rules, mu=0.1, every=2),
        lcq.lc(lambda eta: optax.sgd(eta, 0.9), rules, mu=0.1, every=2, learning_rate=0.1, coupling="proximal"),
    ]
    for tx in wrapped:
        updates, _ = tx.update(W, tx.init(W), W)
        assert jnp.isfinite(updates["kernel"]).all()


def test_an_optimizer_that_promotes_dtypes_itself():
    rules = [lcq.Rule("kernel", lcq.KMeans(2))]
    with jax.numpy_rank_promotion("raise"):  # optax.adam raises b2 to a whole number
        tx = lcq.lc(optax.adam, rules, mu=0.1, every=2, learning_rate=0.1, coupling=lcq.training.adam_step())
        updates, _ = tx.update(W, tx.init(W), W)
    assert jnp.isfinite(updates["kernel"]).all()


METHODS = {
    "hemp": lambda: lcq.hemp(optax.sgd(0.1), [lcq.Rule("kernel", lcq.KMeans(4))], every=1),
    "direct": lambda: lcq.training.iterated_direct(optax.sgd(0.1), [lcq.Rule("kernel", lcq.KMeans(4))], every=1),
    "straight": lambda: lcq.training.straight_through_training(optax.sgd(0.1), [lcq.Rule("kernel", lcq.KMeans(4))]),
}


@pytest.mark.parametrize("method", METHODS)
def test_other_ways_to_train(strict, method):
    tx = METHODS[method]()
    state = tx.init(W)
    for _ in range(2):
        updates, state = tx.update(W, state, W)
    assert jnp.isfinite(updates["kernel"]).all()


def test_choices_and_tables(strict):
    schemes = [lcq.KMeans(2), lcq.KMeans(4)]
    assert "kernel" in str(lcq.table(lcq.compress(W, [lcq.Rule("kernel", schemes[0])]), W))
    assert lcq.pareto(W, {"kernel": schemes}, bits_per_weight=8.0)


def test_tuned_levels(strict):
    forms = lcq.compress(W, [lcq.Rule("kernel", lcq.KMeans(4))])
    tuned = lcq.finetune(lambda p, x: jnp.mean(net(p, x) ** 2), forms, optax.sgd(0.1), [X])
    assert tuned is not None


def test_packed_experts_of_constant_sizes(strict):
    w, sizes = jnp.stack([W["kernel"], -W["kernel"]]), jnp.array([20, 12], jnp.int32)
    forms = lcq.compress({"w": w}, [lcq.Rule("w", lcq.KMeans(4, per="channel"), stacked=1)])
    y = lcq.packed(lambda p, x: jax.lax.ragged_dot(x, p["w"], sizes))(forms, X)
    np.testing.assert_allclose(y, jax.lax.ragged_dot(X, forms["w"].dense(), sizes), atol=1e-4)


def test_the_users_own_code_stays_strict():
    with jax.numpy_rank_promotion("raise"):
        with own_promotion():
            assert (jnp.ones((2, 2)) + jnp.ones(2)).shape == (2, 2)
        with pytest.raises(ValueError, match="rank_promotion"):
            jnp.ones((2, 2)) + jnp.ones(2)


@pytest.mark.parametrize("kind", [jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.bfloat16])
@pytest.mark.parametrize("scheme", [*SCHEMES, lcq.Binary()], ids=str)
def test_float8_leaves(kind, scheme):
    """Computed in float32, as bfloat16 leaves are: as good as the form of the same numbers in float32."""
    short = {"kernel": W["kernel"].astype(kind)}
    rules = [lcq.Rule("kernel", scheme)]
    form = lcq.compress(short, rules)["kernel"]
    wide = lcq.compress({"kernel": short["kernel"].astype(jnp.float32)}, rules)["kernel"]
    assert form.dense().dtype == kind
    np.testing.assert_allclose(form.dense().astype(jnp.float32), wide.dense(), rtol=0.13, atol=2e-3)
    tx = lcq.lc(optax.sgd(0.1), rules, mu=0.1, every=2)
    updates, _ = tx.update(short, tx.init(short), short)
    assert updates["kernel"].dtype == kind


X64 = """
import jax
jax.config.update("jax_enable_x64", True)
import jax.numpy as jnp, lcq, optax
w = {"k": jnp.linspace(-1, 1, 48, dtype=jnp.float32).reshape(8, 6)}
x = jnp.linspace(-1, 1, 128, dtype=jnp.float32).reshape(16, 8)
schemes = [lcq.KMeans(2), lcq.KMeans(4, per="channel"), lcq.KMeans(4, rate=0.1), lcq.Uniform(4, per=4), lcq.LowRank(2),
           lcq.Uniform(4, zero_point=True), lcq.Ternary(), lcq.Prune(count=9), lcq.L1Ball(3.0),
           lcq.CodedTrellis(0.05, memory=3)]
bad = {}
for s in schemes:
    rules = [lcq.Rule("k", s)]
    form = lcq.compress(w, rules)["k"]
    trees = [form, form.pack(), lcq.lc(optax.sgd(0.1), rules, mu=0.1, every=2).init(w)]
    if isinstance(s, lcq.Uniform):
        trees.append(lcq.quantize(lambda p, x: x @ p["k"], w, [x], rules).forms)
    found = {str(a.dtype) for a in jax.tree.leaves(trees)} & {"float64", "int64", "uint64"}
    bad |= {str(s): found} if found else {}
print(bad)
"""


def test_codebooks_keep_their_dtype_under_x64():
    """In a process of its own: nothing here switches 64 bits on."""
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", X64], capture_output=True, text=True, env=os.environ)
    assert out.stdout.strip() == "{}", out.stdout + out.stderr[-400:]
