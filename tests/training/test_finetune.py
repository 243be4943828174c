"""Numbers in forms, tuned, against normal equations; batch-norm statistics, through linen and nnx, against numpy."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import lcq
from lcq.examples.data import digits
from lcq.examples.models import NormMLP
from lcq.forms import Cast, Codes, Factors, Sparse, Sum

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(200, 6)).astype(np.float32)
Y = RANDOM.normal(size=(200, 4)).astype(np.float32)
W = RANDOM.normal(size=(6, 4)).astype(np.float32)


def affine_loss(params, batch):
    """Least squares in both kernels at once, and the bias."""
    x, y = batch
    kernels = [params[name]["kernel"] for name in ("a", "b") if name in params]
    return jnp.mean((sum(x @ k.astype(jnp.float32) for k in kernels) + params["bias"] - y) ** 2)


def tuned(forms, tx=None, steps=400, loss=affine_loss, batch=(X, Y), **settings):
    tx = tx or optax.adam(optax.cosine_decay_schedule(0.05, steps))
    return lcq.finetune(loss, forms, tx, [batch] * steps, **settings)


def net(*forms):
    return {name: {"kernel": form} for name, form in zip("ab", forms, strict=False)} | {"bias": jnp.ones(4)}


def mask_of(form):
    return np.asarray(form.unpack().mask)


def cells(form):
    """The directions in which a form's dense array can move, by what the form means; in numpy alone."""
    form = form.unpack()
    if isinstance(form, Sparse):
        mask = np.asarray(form.mask)
        if form.levels is None:
            return [np.arange(mask.size).reshape(mask.shape) == i for i in np.flatnonzero(mask)]
        codes = np.asarray(form.values)
        return [mask & (codes == k) for k in range(form.levels.shape[-1])]
    codes = np.asarray(form.codes)
    blocks = (form.levels[..., 0] if form.scale is None else form.scale).shape
    columns = [
        np.arange(codes.shape[1]) == j if blocks[1] > 1 else np.ones(codes.shape[1], bool) for j in range(blocks[1])
    ]
    if form.scale is not None:
        return [np.asarray(form.values)[codes] * column for column in columns]
    return [(codes == k) * column for k in range(form.levels.shape[-1]) for column in columns]


def least_loss(directions, still=0.0):
    """The least mean square over combinations of directions and a bias, by normal equations in float64."""
    x, y = X.astype(np.float64), Y.astype(np.float64) - X.astype(np.float64) @ np.broadcast_to(still, (6, 4))
    bias = [np.tile(np.eye(4)[j], (len(x), 1)) for j in range(4)]
    design = np.stack([(x @ d).ravel() for d in directions] + [b.ravel() for b in bias], axis=1)
    solution = np.linalg.lstsq(design, y.ravel(), rcond=None)[0]
    return np.mean((design @ solution - y.ravel()) ** 2), sum(s * d for s, d in zip(solution, directions, strict=False))


def sparse(levels=None, seed=1):
    mask = np.random.default_rng(seed).random((6, 4)) < 0.4
    values = jnp.where(mask, jnp.asarray(W if levels is None else np.abs(W) > 0.7), 0)
    values = values if levels is None else values.astype(jnp.uint8)
    return Sparse(jnp.asarray(mask), values, None if levels is None else jnp.asarray(levels).reshape(1, 1, -1))


FORMS = {
    "levels": lcq.KMeans(3).project,
    "levels of channels": lcq.KMeans(2, per="channel").project,
    "many levels": lcq.KMeans(12).project,
    "scale": lcq.Ternary(scale=True).project,
    "scales of channels": lcq.Uniform(3, per="channel").project,
    "sparse": lambda w: sparse(),
    "sparse codes": lambda w: sparse((-0.5, 0.5)),
}


@functools.cache
def form_of(name):
    """Made when a test wants it, not when the file is imported, which every worker does."""
    return FORMS[name](W)


@pytest.mark.parametrize("name", FORMS)
def test_least_squares_ends_at_the_normal_equations(name):
    form, losses = form_of(name), []
    result = tuned(net(form), on_step=lambda number, value: losses.append(float(value)))
    least, dense = least_loss(cells(form))
    np.testing.assert_allclose(affine_loss(lcq.decompress(result), (X, Y)), least, rtol=1e-5)
    np.testing.assert_allclose(result["a"]["kernel"].dense(), dense, atol=2e-4)
    assert len(losses) == 400 and losses[0] > least * 1.01


def test_other_optimizers_end_there_too():
    form = form_of("levels")
    least, dense = least_loss(cells(form))
    for tx, steps in ((optax.lbfgs(), 40), (optax.sgd(0.02, momentum=0.9), 400)):
        result = tuned(net(form), tx, steps)
        np.testing.assert_allclose(affine_loss(lcq.decompress(result), (X, Y)), least, rtol=1e-5)
        np.testing.assert_allclose(result["a"]["kernel"].dense(), dense, atol=2e-3)


def test_factors_end_at_reduced_rank_regression():
    rank = 2
    form = lcq_low_rank(W, rank)
    result = tuned(net(form), optax.sgd(0.1, momentum=0.9), 2000)
    x, y = X.astype(np.float64), Y.astype(np.float64)
    x, y = x - x.mean(0), y - y.mean(0)
    full = np.linalg.lstsq(x, y, rcond=None)[0]
    right = np.linalg.svd(x @ full)[2][:rank]
    least = np.mean((x @ full @ right.T @ right - y) ** 2)
    np.testing.assert_allclose(affine_loss(lcq.decompress(result), (X, Y)), least, rtol=1e-4)
    assert result["a"]["kernel"].left.shape == (6, rank)


def lcq_low_rank(w, rank, room=4):
    u, s, v = np.linalg.svd(w, full_matrices=False)
    keep = np.arange(len(s)) < rank
    left, right = (u * s * keep)[:, :room], (v * keep[:, None])[:room]
    return Factors(jnp.asarray(left), right=jnp.asarray(right), rank=jnp.int32(rank), tail=w.shape)


def test_sums_tune_every_part():
    parts = (lcq.KMeans(2).project(W), sparse())
    result = tuned(net(Sum(parts)), steps=800)
    least, _ = least_loss([d for part in parts for d in cells(part)])
    np.testing.assert_allclose(affine_loss(lcq.decompress(result), (X, Y)), least, rtol=1e-4)


def test_what_leaves_share_is_one_number(tmp_path):
    params = {"a": {"kernel": W}, "b": {"kernel": W[::-1] + 1}, "bias": jnp.ones(4)}
    forms = lcq.compress(params, [lcq.Rule(".*kernel", lcq.KMeans(3), joint=True)])
    seen = []

    def init(numbers):
        seen.append(jax.tree.map(jnp.shape, numbers))
        return tx.init(numbers)

    tx = optax.adam(optax.cosine_decay_schedule(0.05, 400))
    result = tuned(forms, optax.GradientTransformationExtraArgs(init, tx.update))
    assert seen == [{"a/kernel.levels": (1, 1, 3), "bias": (4,)}]
    np.testing.assert_array_equal(result["a"]["kernel"].levels, result["b"]["kernel"].levels)
    both = [a + 1.0 * b for a, b in zip(cells(forms["a"]["kernel"]), cells(forms["b"]["kernel"]), strict=True)]
    least, _ = least_loss(both)
    np.testing.assert_allclose(affine_loss(lcq.decompress(result), (X, Y)), least, rtol=1e-5)
    lcq.save(tmp_path / "net.lcq", result)
    apart = {**forms, "b": {"kernel": dataclasses.replace(forms["b"]["kernel"], levels=jnp.zeros((1, 1, 3)))}}
    with pytest.raises(ValueError, match=r"b/kernel: expected the levels of a/kernel.levels.*shared='a/kernel'"):
        tuned(apart)


@pytest.mark.parametrize("nested", [False, True])
def test_sharing_of_other_shapes_and_in_forms(nested, tmp_path):
    params = {"a": jnp.arange(6.0), "b": jnp.arange(8.0).reshape(2, 4)}
    forms = lcq.compress(params, [lcq.Rule(".", lcq.KMeans(2), joint=True)])
    if nested:
        forms = {name: Sum((form,), shared=form.shared) for name, form in forms.items()}

    def loss(params, batch):
        return jnp.sum((params["a"] - batch) ** 2) + jnp.sum((params["b"] - 2 * batch) ** 2)

    result = tuned(forms, optax.sgd(0.06), 100, loss, 1.0)
    codes = [form.parts[0] if nested else form for form in forms.values()]
    high = [int(np.sum(form.codes)) for form in codes]
    expected = [(low + 2 * also) / (low + also) for low, also in ((6 - high[0], 8 - high[1]), high)]
    np.testing.assert_allclose(np.unique(lcq.decompress(result)["b"]), sorted(expected), rtol=1e-4)
    lcq.save(tmp_path / "net.lcq", result)


def test_what_leaves_do_not_share_stays_their_own(tmp_path):
    pair = [dataclasses.replace(sparse(seed=s), shared="a/kernel") for s in (1, 2)]
    result = tuned(net(*pair))
    least, _ = least_loss([d for form in pair for d in cells(form)])
    np.testing.assert_allclose(affine_loss(lcq.decompress(result), (X, Y)), least, rtol=1e-5)
    thin = [dataclasses.replace(lcq_low_rank(w, 2), shared="a/kernel") for w in (W, 2 * W)]
    lcq.save(tmp_path / "net.lcq", [result, tuned(net(*thin), steps=2)])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
def test_low_precision_is_trained_in_float32_and_seen_rounded(dtype):
    forms = {"w": Cast(jnp.ones(3, dtype)), "v": jnp.ones(2, jnp.bfloat16), "n": jnp.arange(3)}
    target, losses = jnp.array([1.7, 0.2, 1.0]), []

    def loss(params, batch):
        assert params["v"].dtype == jnp.bfloat16 and params["n"].dtype == jnp.int32
        return 1e-3 * (jnp.sum((params["w"] - batch) ** 2) + jnp.sum((params["v"].astype(jnp.float32) - 0.5) ** 2))

    def seen(number, value):
        return losses.append(float(value))

    settings = {"tx": optax.sgd(1.0), "loss": loss, "batch": target, "on_step": seen}  # steps far below a rounding
    result, after = tuned(forms, steps=3000, **settings), losses.clear()
    assert after is None and result["w"].values.dtype == dtype and result["v"].dtype == jnp.bfloat16
    gap = 2 * float(jnp.finfo(dtype).eps) + 0.003  # twice that of neighbours from 1 to 2, and what 3000 steps leave
    np.testing.assert_allclose(result["w"].dense(), target, atol=gap)
    np.testing.assert_allclose(result["v"].astype(jnp.float32), 0.5, atol=0.01)
    again = tuned(result, steps=1, **settings)
    assert losses == [float(loss(lcq.decompress(result), target))]
    assert jax.tree.structure(again) == jax.tree.structure(result)


@pytest.mark.parametrize("nested", [False, True])
def test_scales_in_steps_stay_in_steps(nested):
    """What was trained is what is stored, at as many bits."""
    rng = np.random.default_rng(0)
    scheme = lcq.Uniform(2, per=8, zero_point=True, scale_bits=4)
    scheme = lcq.Additive(scheme, lcq.Prune(count=3)) if nested else scheme
    w, x = jnp.asarray(rng.normal(size=(32, 4)), jnp.float32), jnp.asarray(rng.normal(size=(64, 32)), jnp.float32)
    forms = lcq.compress({"w": w}, [lcq.Rule("w", scheme)])

    def loss(params, batch):
        return jnp.mean((batch @ (params["w"] - 1.2 * w)) ** 2)

    seen: list[float] = []
    rates = optax.piecewise_constant_schedule(3e-3, {199: 0.0})
    tuned = lcq.finetune(loss, forms, optax.adam(rates), [x] * 200, on_step=lambda _, value: seen.append(float(value)))
    after = float(loss(lcq.decompress(tuned), x))
    assert after < 0.8 * seen[0] and tuned["w"].bits == forms["w"].bits
    np.testing.assert_allclose(after, seen[-1], rtol=1e-5)


def test_levels_stay_in_order_and_codes_follow():
    codes = jnp.array([0, 1, 2, 1, 0], jnp.uint8)
    target = jnp.array([3.0, -1.0, 1.0, -1.0, 3.0])
    levels = jnp.array([[-1.0, 0.5, 2.0]])
    mask = jnp.array([True, True, True, False, True])
    for form, wanted in (
        (Codes(codes, levels=levels), target),
        (Sparse(mask, codes * mask, levels), target * mask),
        (Sum((Codes(codes, levels=levels),)), target),
        (Codes(jnp.stack([codes, codes[::-1]]), levels=jnp.stack([levels] * 2)), jnp.stack([target, target[::-1]])),
    ):

        def loss(params, batch):
            return jnp.sum((params["w"] - batch) ** 2)

        form = tuned({"w": form}, optax.sgd(0.1), 100, loss, wanted)["w"]
        np.testing.assert_allclose(form.dense(), wanted, atol=1e-4)
        found = (form.parts[0] if isinstance(form, Sum) else form).levels
        assert (np.diff(found, axis=-1) > 0).all() and form.shape == wanted.shape


def test_fixed_levels_stay():
    form = lcq.KMeans(4, fixed=(0, 0.1)).project(W)
    decay = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.02, momentum=0.9))
    pinned = {
        fixed: set(tuned(net(form), decay, 50, fixed=fixed)["a"]["kernel"].levels.ravel().tolist())
        for fixed in ((0.0,), (0, 0.1), ())
    }
    start = set(np.ravel(form.levels).tolist())
    assert [len(levels & start) for levels in pinned.values()] == [1, 2, 0]
    assert 0.0 in pinned[0.0,] and {0.0, float(np.float32(0.1))} < pinned[0, 0.1]
    moving = [
        d for d, level in zip(cells(form), np.ravel(form.levels), strict=True) if level not in (0, np.float32(0.1))
    ]
    still = 0.1 * cells(form)[int(np.argmin(abs(np.ravel(form.levels) - 0.1)))]
    result = lcq.decompress(tuned(net(form), optax.lbfgs(), 40, fixed=(0, 0.1)))  # no step is lost on what stays
    np.testing.assert_allclose(affine_loss(result, (X, Y)), least_loss(moving, still)[0], rtol=1e-5)


def test_what_is_pruned_stays_pruned():
    form = sparse()
    filled = dataclasses.replace(form, values=jnp.where(form.mask, form.values, 5.0))  # what nobody should look at
    tx = optax.chain(optax.add_decayed_weights(0.1), optax.add_noise(0.1, 0.5, 0), optax.sgd(0.02, momentum=0.9))
    thin = lcq_low_rank(W, 2)
    result = tuned(net(filled, thin), tx, 50)
    chex.assert_trees_all_equal(result, tuned(net(form.pack(), thin.pack()), tx, 50))  # nor does noise, which has room
    dense, kept = np.asarray(result["a"]["kernel"].dense()), np.asarray(form.mask)
    np.testing.assert_array_equal(mask_of(result["a"]["kernel"]), kept)
    np.testing.assert_array_equal(dense[~kept], 0)
    assert (dense[kept] != W[kept]).all()
    assert np.linalg.matrix_rank(result["b"]["kernel"].dense()) == 2


def test_stored_and_working_trees_one_compilation_and_nothing_else_changes():
    forms = net(lcq.KMeans(3).project(W), lcq.Levels((-1.0, 0.0, 1.0)).project(W)) | {"steps": 3}
    stored = jax.tree.map(
        lambda f: f.pack() if isinstance(f, lcq.forms.Form) else f,
        forms,
        is_leaf=lambda f: isinstance(f, lcq.forms.Form),
    )
    before = jax.tree.map(np.array, forms)
    loss = chex.assert_max_traces(affine_loss, n=1)
    results = [tuned(stored, optax.adam(0.01), loss=loss), tuned(forms, optax.adam(0.01))]
    chex.assert_trees_all_equal(forms, before)  # nothing given was donated
    chex.assert_trees_all_equal(*results)
    assert jax.tree.structure(results[0]) == jax.tree.structure(stored)
    np.testing.assert_array_equal(results[0]["b"]["kernel"].codes, stored["b"]["kernel"].codes)
    assert not np.array_equal(results[0]["bias"], forms["bias"])
    only = tuned(forms, optax.adam(0.01), arrays=False)
    np.testing.assert_array_equal(only["bias"], forms["bias"])
    rates = optax.partition(
        {"still": optax.set_to_zero(), "moving": optax.adam(0.01)},
        lambda numbers: {name: "still" if name.endswith(".levels") else "moving" for name in numbers},
    )
    assert jnp.array_equal(tuned(forms, rates)["a"]["kernel"].levels, forms["a"]["kernel"].levels)


def test_steps_and_what_is_told_after_each():
    told = []
    batches = [(X, k * Y) for k in range(9)]
    few = lcq.finetune(
        affine_loss, net(form_of("levels")), optax.sgd(0.1), iter(batches), steps=3, on_step=lambda *a: told.append(a)
    )
    chex.assert_trees_all_equal(few, lcq.finetune(affine_loss, net(form_of("levels")), optax.sgd(0.1), batches[:3]))
    assert [number for number, _ in told] == [1, 2, 3]
    start = affine_loss(lcq.decompress(net(form_of("levels"))), batches[0])
    np.testing.assert_allclose(told[0][1], start, rtol=1e-6)


def test_tune_says_what_is_wrong():
    fixed_table = {"w": lcq.Levels((-1.0, 0.0, 1.0)).project(W)}

    def loss(params, batch):
        return jnp.sum(params["w"] * batch)

    for forms, settings, message in (
        ({"w": W}, {}, "expected a tree with forms, got 1 arrays"),
        (fixed_table, {}, "expected floating-point numbers"),
        (fixed_table | {"bias": W}, {"arrays": False}, "expected floating-point numbers"),
        ({"w": form_of("levels")}, {"steps": 0}, "expected steps >= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            lcq.finetune(loss, forms, optax.sgd(0.1), [1.0], **settings)
    for steps, message in ((None, "at least one batch, got 0"), (2, "expected 2 batches, got 0")):
        with pytest.raises(ValueError, match=message):
            lcq.finetune(loss, {"w": form_of("levels")}, optax.sgd(0.1), [], steps=steps)
    short = [(Cast(jnp.ones(3, dtype)), "w.values") for dtype in ("bfloat16", "float8_e4m3fn", "float4_e2m1fn")]
    for form, name in ((form_of("levels"), "w.levels"), *short):  # 4 bits have neither infinity nor NaN to tell of it
        with pytest.raises(ValueError, match=f"{name}: expected finite numbers.*after 9 updates.*learning rate"):
            lcq.finetune(loss, {"w": form}, optax.sgd(1e38), [-1.0] * 9)


def test_what_goes_beyond_a_format_stays_at_its_largest_number():
    form = Cast(jnp.full(3, 400, "float8_e4m3fn"))
    result = tuned({"w": form}, optax.sgd(10.0), 9, lambda params, batch: -jnp.sum(params["w"]))["w"]
    np.testing.assert_array_equal(result.values.astype(jnp.float32), 448)


def test_tune_then_recalibrate():
    """The order for a net with batch norm: compress, tune, gather the statistics of what is shipped."""
    split = digits()
    model, x, y = NormMLP((20, 10)), split.x_train[:256], split.y_train[:256]
    variables = model.init(jax.random.key(0), x)

    def apply(params, statistics, x):
        return model.apply({"params": params, "batch_stats": statistics}, x, train=True, mutable=["batch_stats"])

    def loss(params, batch):
        logits, _ = apply(params, variables["batch_stats"], x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    forms = lcq.compress(variables["params"], [lcq.Rule(".*kernel", lcq.KMeans(4))])
    result = lcq.finetune(loss, forms, optax.adam(0.03), [None] * 60)
    small = lcq.decompress(result)
    statistics = lcq.recalibrate_batch_norm(
        jax.jit(lambda s, x: apply(small, s, x)[1]["batch_stats"]), variables["batch_stats"], [x]
    )
    logits = model.apply({"params": small, "batch_stats": statistics}, x)
    trained = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    np.testing.assert_allclose(trained, loss(small, None), rtol=0.05)
    assert trained < 0.8 * loss(lcq.decompress(forms), None)


BATCHES = [np.random.default_rng(i).normal(2.0, 3.0, size=(64, 5)).astype(np.float32) for i in range(4)]
MEAN = np.mean([b.astype(np.float64).mean(0) for b in BATCHES], 0)
VAR = np.mean([b.astype(np.float64).var(0) for b in BATCHES], 0)


@pytest.mark.parametrize("momentum", [0.99, 0.5, 0.0])
def test_linen(momentum):
    model = nn.BatchNorm(use_running_average=False, momentum=momentum)
    variables = model.init(jax.random.key(0), BATCHES[0])

    @jax.jit
    def step(statistics, x):
        new = model.apply({**variables, "batch_stats": statistics}, x, mutable=["batch_stats"])[1]
        return new["batch_stats"]

    statistics = lcq.recalibrate_batch_norm(step, variables["batch_stats"], BATCHES)
    np.testing.assert_allclose(statistics["mean"], MEAN, rtol=1e-4)
    np.testing.assert_allclose(statistics["var"], VAR, rtol=1e-4)


def test_nnx():
    graph, statistics, rest = nnx.split(nnx.BatchNorm(5, rngs=nnx.Rngs(0)), nnx.BatchStat, ...)

    @jax.jit
    def step(statistics, x):
        model = nnx.merge(graph, statistics, rest, copy=True)
        model(x, use_running_average=False)
        return nnx.state(model, nnx.BatchStat)

    statistics = lcq.recalibrate_batch_norm(step, statistics, BATCHES)
    np.testing.assert_allclose(statistics["mean"][...], MEAN, rtol=1e-4)
    np.testing.assert_allclose(statistics["var"][...], VAR, rtol=1e-4)


def test_no_batch_and_no_training_mode_are_errors():
    with pytest.raises(ValueError, match="at least one batch"):
        lcq.recalibrate_batch_norm(lambda s, x: s, {"mean": jnp.zeros(2)}, [])
    with pytest.raises(ValueError, match=r"'mean'.*training mode"):
        lcq.recalibrate_batch_norm(lambda s, x: s, {"mean": jnp.zeros(2)}, [1])
