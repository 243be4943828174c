"""Smooth binary weights against loops over groups in float64, finite differences and a second formula."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lcq
from lcq.layers import linen
from lcq.layers import nnx as layers
from lcq.training.smooth_binary import AnnealedTanh, GroupPower, StraightSign, smooth_binary

LEAST, SETTLED, WIDTH, LAST = 0.02, 0.8, 0.03, 0.03
RNG = np.random.default_rng(0)


def labels(shape, per):
    """The number of the group that each weight is in, written out for every kind of `per`."""
    index = np.indices(shape)
    if per is None:
        return np.zeros(shape, int)
    if per == "channel":
        return index[-1]
    if isinstance(per, int):
        return index[-2] // per * shape[-1] + index[-1]
    assert per == (1, 0)
    return index[-2]


def by_groups(f, w, per):
    """f of each group's weights, put back."""
    out, where = np.zeros(w.shape), labels(w.shape, per)
    for group in np.unique(where):
        out[where == group] = f(w[where == group])
    return out


def b_of(w, t):
    """The formula, for one group."""
    p, e = 1 - (1 - LEAST) * t / SETTLED, WIDTH
    if t > SETTLED:
        p, e = (x * np.exp(np.interp(t, [SETTLED, 1], [0, np.log(LAST)])) for x in (LEAST, WIDTH))
    u = (w - w.mean()) / np.sqrt(w.var())
    phi = np.sign(u) * np.abs(u) * (u**2 + e**2) ** ((p - 1) / 2)
    return phi / np.sqrt((phi**2).mean())


def tanh_of(w, t):
    return np.tanh(100 ** min(1, t / SETTLED) * (w - w.mean()) / w.std())


def sizes(alpha, w, per, centred=True):
    """alpha of each weight."""
    if alpha == "constant":
        return np.full(w.shape, np.sqrt(2 / np.prod(w.shape[:-1])))
    return by_groups(lambda g: np.abs(g - g.mean() * centred).mean(), w, per)


CASES = [
    (GroupPower, "mean", (7, 5), None),
    (GroupPower, "mean", (3, 2, 4, 6), "channel"),
    (GroupPower, "constant", (3, 2, 4, 6), "channel"),
    (GroupPower, "mean", (8, 3), 4),
    (GroupPower, "constant", (8, 3), 2),
    (GroupPower, "mean", (5, 6), (1, 0)),
    (GroupPower, "constant", (6,), None),
    (AnnealedTanh, "constant", (7, 5), None),
    (AnnealedTanh, "mean", (8, 3), 4),
]
SMOOTH = {GroupPower: b_of, AnnealedTanh: tanh_of}


@functools.partial(jax.jit, static_argnums=(0, 3))
def transformed(binarization, w, t, group):
    return binarization(w, t, group)


@functools.partial(jax.jit, static_argnums=(0, 3))
def gradient(binarization, w, t, group, c):
    """Of sum c W with respect to w."""
    return jax.grad(lambda w: jnp.sum(c * binarization(w, t, group).astype(jnp.float32)))(w)


@functools.partial(jax.jit, static_argnums=(0, 2))
def projected(binarization, w, group):
    return binarization.project(w, group)


@functools.partial(jax.jit, static_argnums=0)
def deviations(binary, params, t):
    return binary.deviation(params, t)


def normal(shape, dtype=jnp.float32):
    return jnp.asarray(0.3 * RNG.normal(size=shape) + 0.1, dtype)


@pytest.mark.parametrize(("kind", "alpha", "shape", "per"), CASES)
def test_values_are_those_of_a_loop_over_groups(kind, alpha, shape, per):
    w = normal(shape)
    w64 = np.asarray(w, np.float64)
    for t in (0.0, 0.3, 0.8, 0.9, 1.0):
        wanted = sizes(alpha, w64, per) * by_groups(lambda g, t=t: SMOOTH[kind](g, t), w64, per)
        np.testing.assert_allclose(transformed(kind(alpha), w, t, per), wanted, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("kind", "alpha", "per", "times"),
    [
        (GroupPower, "constant", None, (0.6,)),
        (GroupPower, "mean", "channel", (0.3, 0.9)),
        (GroupPower, "mean", 4, (0.3,)),
        (AnnealedTanh, "mean", "channel", (0.0, 0.3)),
    ],
)
def test_gradients_are_finite_differences(kind, alpha, per, times):
    w, c = normal((8, 3)), RNG.normal(size=(8, 3))
    w64 = np.asarray(w, np.float64)

    def value(w, t):
        return np.sum(c * sizes(alpha, w, per) * by_groups(lambda g: SMOOTH[kind](g, t), w, per))

    steps = 1e-6 * np.eye(w.size).reshape(-1, *w.shape)
    for t in times:
        wanted = np.array([(value(w64 + h, t) - value(w64 - h, t)) / 2e-6 for h in steps]).reshape(w.shape)
        got = gradient(kind(alpha), w, t, per, jnp.asarray(c, jnp.float32))
        np.testing.assert_allclose(got, wanted, rtol=2e-3, atol=1e-3 * np.abs(wanted).max())


def test_gradients_are_those_of_a_second_formula():
    """By powers of |u|, row by row; also with respect to t."""
    w, c = normal((3, 24)), normal((3, 24))

    def plain(w, t):
        p, x = 1 - (1 - LEAST) * t / SETTLED, w - jnp.mean(w, 1)[:, None]
        u = x / jnp.std(w, 1)[:, None]
        phi = u / jnp.power(u**2 + WIDTH**2, (1 - p) / 2)
        return jnp.sum(c * phi / jnp.linalg.norm(phi, axis=1)[:, None] * jnp.mean(jnp.abs(x), 1)[:, None]) * 24**0.5

    def ours(w, t):
        return jnp.sum(c * GroupPower()(w, t, (1, 0)))

    for got, wanted in zip(*(jax.jit(jax.grad(f, (0, 1)))(w, 0.5) for f in (ours, plain)), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-4)


def test_the_path_begins_standardised_and_ends_nearly_binary():
    w, constant = normal((4000, 3)), GroupPower("constant")
    binary = smooth_binary([lcq.Rule("w", lcq.Binary(per="channel"))], constant)
    begin = transformed(constant, w, 0.0, "channel") / np.sqrt(2 / 4000)
    np.testing.assert_allclose(begin, (w - w.mean(0)) / w.std(0), rtol=1e-3, atol=1e-5)
    path = np.array([deviations(binary, {"w": w}, t)["w"] for t in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)]).squeeze()
    assert path.shape == (6, 3) and (np.diff(path, axis=0) < 0).all()
    np.testing.assert_allclose(path[0], 2, atol=0.3)  # the fourth moment of normal numbers is 3
    u = np.linspace(0, 9, 400_001)
    for at, fall, atol in ((4, 1, 0.006), (5, LAST, 0.0005)):
        phi2, density = u**2 * (u**2 + (WIDTH * fall) ** 2) ** (LEAST * fall - 1), np.exp(-(u**2) / 2)
        floor = (phi2**2 @ density) * density.sum() / (phi2 @ density) ** 2 - 1
        np.testing.assert_allclose(path[at], floor, atol=atol)


@pytest.mark.parametrize(
    ("kind", "per", "counts"),
    [(GroupPower, None, (1, 1)), (GroupPower, 4, (2, 3)), (GroupPower, 2, (4, 3)), (AnnealedTanh, "channel", (1, 3))],
)
def test_the_gap_is_that_of_the_formula(kind, per, counts):
    w = normal((8, 3))
    b = by_groups(lambda g: SMOOTH[kind](g, 0.3), np.asarray(w, np.float64), per)
    assert kind is AnnealedTanh or abs((b**2).mean() - 1) < 1e-6
    wanted = by_groups(lambda g: (g**4).mean() / (g**2).mean() ** 2 - 1, b, per)[:: 8 // counts[0], :: 3 // counts[1]]
    got = deviations(smooth_binary([lcq.Rule("w", lcq.Binary(per=per))], kind()), {"w": w}, 0.3)["w"]
    assert got.shape == counts
    np.testing.assert_allclose(got, wanted, atol=1e-4)
    assert per != 2 or np.abs(got).max() < 1e-6


@pytest.mark.parametrize("binarization", [GroupPower("constant"), AnnealedTanh("constant")])
def test_signs_are_those_that_are_deployed_and_shift_and_scale_do_not_matter(binarization):
    w = normal((3, 3, 8, 16))
    form = projected(binarization, w, "channel")
    assert form.scale.size == 1 and (np.sign(w) != np.sign(form.dense())).any()
    for t in (0.0, 0.5, 1.0):
        b = transformed(binarization, w, t, "channel")
        np.testing.assert_array_equal(np.sign(b), np.sign(form.dense()))
        np.testing.assert_allclose(transformed(binarization, 7 * w - 2, t, "channel"), b, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(transformed(binarization, -w, t, "channel"), -b, rtol=1e-5, atol=1e-6)


EVERY = [GroupPower("constant"), GroupPower(), AnnealedTanh(), StraightSign("constant"), StraightSign(centres=True)]


@pytest.mark.parametrize("binarization", EVERY, ids=repr)
@pytest.mark.parametrize("group", ["channel", 1])
def test_equal_weights_and_groups_of_one_are_defined(binarization, group):
    binary = smooth_binary([lcq.Rule("w", lcq.Binary(per=group))], binarization)
    for value in (0.0, 0.1, -1000.0, 1e-20):
        w = jnp.full((7, 3), value)
        for t in (0.0, 1.0):
            out, slope = transformed(binarization, w, t, group), gradient(binarization, w, t, group, SLOPES)
            assert np.isfinite(out).all() and np.isfinite(slope).all()
            assert not isinstance(binarization, GroupPower) or (np.asarray(out) == 0).all()
        assert np.isfinite(projected(binarization, w, group).dense()).all()
        wanted = 0 if isinstance(binarization, StraightSign) else -1
        np.testing.assert_array_equal(deviations(binary, {"w": w}, 1.0)["w"], wanted)


SLOPES = jnp.arange(21.0).reshape(7, 3)


@pytest.mark.parametrize(("alpha", "centres"), [("constant", False), ("mean", False), ("mean", True)])
def test_straight_signs(alpha, centres):
    w, c = normal((8, 3)), RNG.normal(size=(8, 3))
    w64 = np.asarray(w, np.float64)
    x = by_groups(lambda g: g - g.mean(), w64, "channel") if centres else w64
    wanted = sizes(alpha, w64, "channel", centres) * np.where(x >= 0, 1, -1)
    control = StraightSign(alpha, centres)
    np.testing.assert_allclose(transformed(control, w, 0.3, "channel"), wanted, rtol=1e-5)
    np.testing.assert_allclose(projected(control, w, "channel").dense(), wanted, rtol=1e-5)
    slope = gradient(control, w, 0.3, "channel", jnp.asarray(c, jnp.float32))
    np.testing.assert_allclose(slope, c - c.mean(0) if centres else c, rtol=1e-5, atol=1e-6)


def test_sign_of_zero_is_positive():
    assert (transformed(StraightSign("constant"), jnp.zeros((7, 3)), 0.0, "channel") > 0).all()
    assert (projected(GroupPower("constant"), jnp.zeros((7, 3)), "channel").dense() > 0).all()


@pytest.mark.parametrize("binarization", [GroupPower("constant"), StraightSign()], ids=repr)
def test_learned_alphas(binarization):
    """Values are theirs, and their gradients the sums of c b."""
    binary = smooth_binary([lcq.Rule("w", lcq.Binary(per=4))], binarization)
    params, c = {"w": normal((8, 3)), "b": jnp.ones(3)}, normal((8, 3))
    alphas = binary.alphas(params)
    assert list(alphas) == ["w"] and alphas["w"].shape == (2, 3)
    call = jax.jit(lambda params, alphas: binary(params, 0.5, alphas)["w"])
    np.testing.assert_allclose(call(params, alphas), transformed(binarization, params["w"], 0.5, 4), rtol=1e-6)
    learned = {"w": -alphas["w"] * jnp.arange(1.0, 7).reshape(2, 3)}
    slope = jax.jit(jax.grad(lambda alphas: jnp.sum(c * call(params, alphas))))(learned)["w"]
    alpha = np.repeat(learned["w"], 4, 0)
    b = np.asarray(call(params, learned)) / alpha
    np.testing.assert_allclose(slope, (c * b).reshape(2, 4, 3).sum(1), rtol=1e-4, atol=1e-5)
    form = binary.compress(params, learned)["w"]
    np.testing.assert_allclose(form.dense(), alpha * np.sign(b), rtol=1e-6)


def test_half_precision_leaves_are_computed_in_float32():
    w = normal((8, 3), jnp.bfloat16)
    wide = transformed(GroupPower(), w.astype(jnp.float32), 0.6, "channel")
    np.testing.assert_array_equal(transformed(GroupPower(), w, 0.6, "channel"), wide.astype(jnp.bfloat16))
    slope = gradient(GroupPower(), w, 0.6, "channel", wide)
    assert slope.dtype == jnp.bfloat16 and np.isfinite(np.asarray(slope, np.float32)).all()
    form = projected(GroupPower(), w, "channel")
    assert form.dense().dtype == jnp.bfloat16 and form.scale.dtype == jnp.float32


# Trees

RULES = [
    lcq.Rule("first/kernel", None),
    lcq.Rule("stack", lcq.Binary(per="channel"), stacked=1),
    lcq.Rule("(.*/)?kernel", lcq.Binary(per="channel")),
]
PARAMS = {
    "first": {"kernel": normal((4, 5))},
    "second": {"kernel": normal((6, 4)), "bias": normal((4,))},
    "stack": normal((3, 6, 4)),
}


def test_rules_select_leaves_and_stacked_ones_are_taken_apart():
    binary = smooth_binary(RULES)
    out, forms, deviation, alphas = jax.jit(
        lambda p: (binary(p, 0.4), binary.compress(p), binary.deviation(p, 0.4), binary.alphas(p))
    )(PARAMS)
    for tree in (out, forms):
        np.testing.assert_array_equal(tree["first"]["kernel"], PARAMS["first"]["kernel"])
        np.testing.assert_array_equal(tree["second"]["bias"], PARAMS["second"]["bias"])
    for i, w in enumerate(PARAMS["stack"]):
        np.testing.assert_allclose(out["stack"][i], transformed(GroupPower(), w, 0.4, "channel"), rtol=1e-5)
        np.testing.assert_allclose(forms["stack"].dense()[i], projected(GroupPower(), w, "channel").dense(), rtol=1e-5)
    for shapes in (deviation, alphas):
        assert {path: a.shape for path, a in shapes.items()} == {"second/kernel": (1, 4), "stack": (3, 1, 4)}
    np.testing.assert_allclose(alphas["stack"], forms["stack"].scale)
    constant = jax.jit(smooth_binary(RULES, GroupPower("constant")).compress)(PARAMS)
    np.testing.assert_allclose(constant["stack"].scale, np.sqrt(2 / 6) * np.ones((3, 1, 1)), rtol=1e-6)


def test_traced_progress_is_compiled_once_in_scan_and_mapped():
    binary, traces = smooth_binary(RULES), []

    def transform(params, t):
        traces.append(t)
        return binary(params, t)["second"]["kernel"]

    times = jnp.linspace(0, 1, 5)
    w = {**PARAMS, "second": {"kernel": jnp.stack([PARAMS["second"]["kernel"] * n for n in (1.0, -2.0)])}}
    axes = {"first": {"kernel": None}, "second": {"kernel": 0}, "stack": None}
    mapped = jax.vmap(transform, (axes, None))
    _, found = jax.jit(lambda w: jax.lax.scan(lambda carry, t: (carry, mapped(w, t)), None, times))(w)
    assert len(traces) <= 2
    for i, t in enumerate(times):
        for j in range(2):
            wanted = transformed(GroupPower(), w["second"]["kernel"][j], t, "channel")
            np.testing.assert_allclose(found[i, j], wanted, rtol=1e-5)


def test_paths_of_nnx():
    graph, state = nnx.split(nnx.eval_shape(lambda: nnx.Linear(4, 3, rngs=nnx.Rngs(0))))
    state = jax.tree.map(lambda a: normal(a.shape), state)
    binary = smooth_binary([lcq.Rule("kernel", lcq.Binary())])
    got = nnx.merge(graph, binary(state, 1.0)).kernel[...]
    np.testing.assert_allclose(got, transformed(GroupPower(), state["kernel"][...], 1.0, None), rtol=1e-5)


ERRORS = [
    (lambda: smooth_binary([lcq.Rule("w", lcq.Ternary())]), "rule 'w': expected lcq.Binary(per=...)"),
    (lambda: smooth_binary([lcq.Rule("w", lcq.Binary(scale=False))]), "rule 'w': expected lcq.Binary(per=...)"),
    (lambda: smooth_binary([lcq.Rule("w", lcq.KMeans(2))]), "got KMeans"),
    (lambda: smooth_binary([lcq.Rule("w", lcq.Binary(), joint=True)]), "joint=True; drop it"),
    (lambda: smooth_binary([lcq.Rule("v", lcq.Binary())])({"w": jnp.ones(3)}, 0.0), "matches no leaf"),
    (lambda: smooth_binary([lcq.Rule("w", lcq.Binary(per=2))])({"w": jnp.ones((3, 2))}, 0.0), "w: per=2"),
    (lambda: smooth_binary([lcq.Rule("w", lcq.Binary())])({"w": jnp.ones(3)}, 12), "expected t, progress from 0 to 1"),
    (lambda: smooth_binary([lcq.Rule("w", lcq.Binary())]).compress({"w": jnp.full(3, jnp.nan)}), "w: expected finite"),
    (lambda: smooth_binary([lcq.Rule("w", lcq.Binary())])({"w": jnp.ones(3)}, 0.0, {"v": 1}), "more or fewer: v, w"),
    (
        lambda: smooth_binary([lcq.Rule("w", lcq.Binary())])({"w": jnp.ones(3)}, 0.0, {"w": jnp.ones(3)}),
        "w: expected alpha [1]",
    ),
    (lambda: GroupPower("learned"), "expected alpha='mean' or 'constant'"),
    (lambda: smooth_binary([]), "expected a rule with a scheme"),
    (lambda: GroupPower(width=0.0), "last width >= 1e-12"),
    (lambda: GroupPower(last=1e-22), "last width >= 1e-12"),
    (lambda: GroupPower(last=2.0), "last <= 1"),
    (lambda: GroupPower(settled=1 - 1e-9), "settled <= .999"),
    (lambda: GroupPower(guard=1e-40), "guard >= 1e-30"),
    (lambda: GroupPower(least=0.0), "0 < least"),
    (lambda: AnnealedTanh(steepest=0.5), "1 <= steepest"),
]


@pytest.mark.parametrize(("act", "message"), ERRORS, ids=[message for _, message in ERRORS])
def test_errors_say_what_to_do(act, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        act()


# What is trained, and what is deployed


def test_an_optimizer_trains_it_and_what_is_deployed_is_what_was_trained(problem):
    binary = smooth_binary([lcq.Rule("(.*/)?kernel", lcq.Binary(per="channel"))])
    tx, steps = optax.sgd(0.3, 0.9, nesterov=True), 200

    def step(carry, i):
        params, state = carry
        value, grads = jax.value_and_grad(lambda p: problem.loss(binary(p, i / steps)))(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    @jax.jit
    def run(params):
        (params, _), losses = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(steps))
        hard = problem.loss(lcq.decompress(binary.compress(params)))
        return losses, problem.loss(binary(params, 1.0)), hard, binary.deviation(params, 1.0)

    losses, soft, hard, deviation = run(problem.params)
    assert losses[0] > 1.5 and soft < 0.1 and hard < soft + 0.03
    assert all(g.mean() < 0.05 for g in deviation.values())


def test_forms_are_packed_saved_and_run_on_kernels_of_one_bit(tmp_path):
    binary = smooth_binary([lcq.Rule("w", lcq.Binary(per="channel"))])
    constant = smooth_binary(binary.rules, GroupPower("constant"))
    params, x = {"w": normal((64, 8))}, normal((2, 64))
    forms = binary.compress(params)
    assert lcq.sizes(forms)["w"].bits == 64 * 8 + 32 * 8
    assert lcq.sizes(constant.compress(params))["w"].bits == 64 * 8 + 32
    lcq.save(tmp_path / "net.lcq", forms)
    loaded = lcq.load(tmp_path / "net.lcq")
    np.testing.assert_array_equal(loaded["w"].dense(), forms["w"].dense())
    assert loaded["w"].codes.dtype == np.uint32 and loaded["w"].codes.size == 64 * 8 // 32
    net = lcq.packed(lambda params, x: x @ params["w"])
    assert [use.how for use in net.report(loaded, x)] == ["product"]
    np.testing.assert_allclose(net(loaded, x), x @ forms["w"].dense(), rtol=1e-5, atol=1e-5)


def loop(x, w, alpha):
    """sign(x) * alpha sign(w - mean w), a VALID convolution, in float64."""
    s = np.where(np.asarray(x) >= 0, 1, -1)
    signs = np.where(w - w.mean((0, 1, 2)) >= 0, 1, -1) * alpha
    h, v = (s.shape[i] - w.shape[i - 1] + 1 for i in (1, 2))
    places = [np.tensordot(s[:, i : i + w.shape[0], j : j + w.shape[1]], signs, 3) for i in range(h) for j in range(v)]
    return np.stack(places, 1).reshape(len(s), h, v, -1)


def test_binary_layers_take_what_was_compressed_and_freeze_it():
    x, w = normal((2, 4, 4, 5)), normal((3, 3, 5, 6))
    w64 = np.asarray(w, np.float64)
    wanted = loop(x, w64, sizes("mean", w64, "channel")[0, 0, 0])
    binary = smooth_binary([lcq.Rule("params/kernel", lcq.Binary(per="channel"))])
    variables = lcq.decompress(binary.compress({"params": {"kernel": w}}))
    net = linen.BinaryConv(6, (3, 3), padding="VALID", use_bias=False)
    trained = jax.jit(net.apply)(variables, x)
    np.testing.assert_allclose(trained, wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(jax.jit(net.apply)(linen.freeze(net, variables, x), x), trained)
    layer = layers.BinaryDense(5, 6, use_bias=False, rngs=nnx.Rngs(0))
    layer.kernel.set_value(projected(GroupPower("constant"), w[0, 0], "channel").dense())
    y = np.where(x >= 0, 1, -1) @ np.asarray(layer.kernel[...], np.float64)
    np.testing.assert_allclose(layer(x), y, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(layers.freeze(layer)(x), layer(x))


def test_leaves_with_a_layout():
    """Groups are the layout's; a constant alpha, which knows inputs by their place, is refused."""
    w = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8)), jnp.float32)
    rules = [lcq.Rule("w", lcq.Binary(per="channel"), layout="oi")]
    turned = lcq.smooth_binary([lcq.Rule("w", lcq.Binary(per="channel"))])({"w": w.T}, 0.5)["w"].T
    np.testing.assert_allclose(lcq.smooth_binary(rules)({"w": w}, 0.5)["w"], turned, rtol=1e-5)
    with pytest.raises(ValueError, match=r"rule 'w': the constant alpha .* expected no layout, got 'oi'; transpose"):
        lcq.smooth_binary(rules, lcq.training.GroupPower("constant"))
