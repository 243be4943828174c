"""`lc` inside the ecosystem: every wrapper ends with the Theta of the plain loop, in one compilation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import lcq
from lcq.training.lc import LCState
from lcq.tree.paths import flatten

pytestmark = pytest.mark.filterwarnings("ignore:the weights are")


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_the_plain_loop_compresses_and_compiles_once_as_the_bare_optimizer_does(problem, plain):
    params, state = plain
    forms = lcq.extract(state, params)
    assert lcq.metrics(state)["c_steps"] == 4
    assert {p for p, leaf in flatten(forms)[0].items() if isinstance(leaf, lcq.forms.Form)} == {
        "dense0/kernel",
        "dense1/kernel",
    }
    before, after = (problem.loss(p) for p in (lcq.decompress(lcq.compress(problem.params, problem.rules)), params))
    assert after < before


def test_chain_with_clipping_on_either_side(problem, tx, same_theta):
    left, right = optax.clip(0.01), optax.clip(0.005)

    def by_hand(grads, state, params):
        updates, state = tx.update(left.update(grads, None)[0], state, params)
        return right.update(updates, None)[0], state

    params, state = problem.train(optax.chain(left, tx, right))
    same_theta(state, params, like=problem.train(optax.GradientTransformation(tx.init, by_hand)))


def test_partition(problem, tx, same_theta):
    labels = jax.tree.map_with_path(lambda keys, _: keys[-1].key, problem.params)
    transforms = {"kernel": tx, "bias": optax.sgd(0.1, momentum=0.9)}
    params, state = problem.train(optax.partition(transforms, labels))
    same_theta(state, params)
    again = lcq.training.c_step(state, params)
    assert lcq.metrics(again)["c_steps"] == lcq.metrics(state)["c_steps"] + 1


def test_multi_steps_counts_emitted_updates(problem, tx, same_theta):
    """With the same batch twice the mean gradient is the gradient, but for the rounding of some compilers."""
    params, state = problem.train(optax.MultiSteps(tx, 2), steps=20)
    same_theta(state, params, exact=False)
    assert lcq.metrics(state)["c_steps"] == 4


def test_inject_hyperparams(problem, same_theta):
    def inner(eta):
        return optax.sgd(eta, momentum=0.9)

    clipping = problem.tx(inner, learning_rate=0.1)
    injected = optax.inject_hyperparams(lcq.lc, static_args=("inner", "mu", "every", "coupling"))
    settings = problem.settings(learning_rate=0.1)
    params, state = problem.train(injected(inner, **settings))
    same_theta(state, params, like=problem.train(clipping))
    scheduled = injected(inner, **settings | {"learning_rate": lambda n: jnp.where(n < 5, 0.1, 0.0)})
    params, _ = problem.train(scheduled)
    assert_same(params, problem.train(clipping, steps=5)[0])


def test_apply_if_finite(problem, tx, same_theta):
    def poisoned(grads, i):
        return jax.tree.map(lambda g: jnp.where(i == 4, jnp.nan, g), grads)

    params, state = problem.train(optax.apply_if_finite(tx, 3), steps=11, gradient=poisoned)
    assert state.total_notfinite == 1
    same_theta(state, params, exact=False)


def test_linen_train_state(problem, tx, same_theta):
    @jax.jit
    def step(train_state):
        return train_state.apply_gradients(grads=jax.grad(problem.loss)(train_state.params))

    train_state = TrainState.create(apply_fn=problem.model.apply, params=problem.params, tx=tx)
    train_state = train_state.replace(step=jnp.int32(0))  # flax starts with a Python int: one compilation more
    for _ in range(10):
        train_state = step(train_state)
    same_theta(train_state.opt_state, train_state.params)
    assert step._cache_size() == 1


class Net(nnx.Module):
    """The same net in nnx."""

    def __init__(self, params):
        rngs = nnx.Rngs(0)
        self.dense0, self.dense1 = nnx.Linear(64, 12, rngs=rngs), nnx.Linear(12, 10, rngs=rngs)
        nnx.update(self, jax.tree.map(nnx.Param, params))

    def __call__(self, x):
        return self.dense1(nnx.tanh(self.dense0(x.reshape(x.shape[0], -1))))


def test_nnx_optimizer(problem, tx, same_theta):
    net = Net(problem.params)
    optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)
    traces = []

    @nnx.jit
    def step(net, optimizer):
        traces.append(1)

        def loss(net):
            return optax.softmax_cross_entropy_with_integer_labels(net(problem.x), problem.y).mean()

        optimizer.update(net, nnx.grad(loss)(net))

    for _ in range(10):
        step(net, optimizer)
    params = nnx.to_pure_dict(nnx.state(net, nnx.Param))
    same_theta(optimizer.opt_state, params)
    assert len(traces) == 1
    forms = lcq.extract(optimizer.opt_state, nnx.state(net, nnx.Param))
    assert {type(leaf).__name__ for leaf in flatten(forms)[0].values()} == {"Codes", "ArrayImpl"}
    stepped = lcq.training.c_step(optimizer.opt_state, nnx.state(net, nnx.Param))
    nnx.update(optimizer.opt_state, nnx.state(stepped))
    assert lcq.metrics(optimizer.opt_state)["c_steps"] == 5


def test_params_and_state_are_donated_together(problem, tx, same_theta):
    fresh = jax.tree.map(jnp.copy, problem.params)
    same_theta(*reversed(problem.train(tx, params=fresh, donate=True)))
    cast = problem.tx(rules=[lcq.Rule("(.*/)?kernel", lcq.Cast("float32"))])
    problem.train(cast, params=jax.tree.map(jnp.copy, problem.params), donate=True, steps=2)


def test_tree_map_params_and_get(problem):
    tx = optax.chain(optax.clip(1.0), problem.tx(optax.adam(0.01)))
    state = tx.init(problem.params)
    assert_same(optax.tree.map_params(tx, lambda leaf: leaf, state), state)
    specs = jax.tree.map(lambda leaf: f"spec of {leaf.shape}", problem.params)
    mapped = optax.tree.map_params(
        tx,
        lambda _, spec: spec,
        state,
        specs,
        transform_non_params=lambda _: "replicated",
        is_leaf=lambda node: isinstance(node, optax.MaskedNode),
    )
    lagrangian = mapped[1].lagrangian
    for tree in (lagrangian.multipliers, *lagrangian.codes, mapped[1].inner[0].mu):
        assert tree["dense0"]["kernel"] == "spec of (64, 12)"
    assert lagrangian.codebooks == lagrangian.c_steps == mapped[1].steps == "replicated"
    assert_same(optax.tree.get(state, "mu"), state[1].inner[0].mu)
    assert_same(optax.tree.get(state, "count"), state[1].inner[0].count)


@pytest.mark.parametrize("every", [None, (3, 2)])
def test_vmap_ensembles(problem, tx, every):
    """Two nets in one program end where each ends alone; with every=None the C steps are made by hand."""
    ensemble = problem.tx(every=every)
    params = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.5 * leaf]), problem.params)

    @jax.jit
    @jax.vmap
    def step(params, state):
        updates, state = ensemble.update(jax.grad(problem.loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state, c_step = jax.jit(jax.vmap(ensemble.init))(params), jax.jit(jax.vmap(lcq.training.c_step))
    for i in range(6):
        if every is None and i in (3, 5):
            state = c_step(state, params)
        params, state = step(params, state)
    for i, factor in enumerate((1, 0.5)):
        alone = problem.train(tx, jax.tree.map(lambda leaf, f=factor: f * leaf, problem.params), steps=6)
        for got, expected in zip(jax.tree.leaves((params, state)), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(got[i], expected, rtol=1e-3, atol=1e-5)
        assert lcq.metrics(alone[1])["c_steps"] == 2


def test_bfloat16_parameters_have_a_float32_state(problem, tx):
    small = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), problem.params)
    params, state = problem.train(tx, params=small)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.lagrangian.multipliers)} == {jnp.dtype("float32")}
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    forms, like = lcq.extract(state, params), lcq.extract(state, wide)
    for path, form in flatten(forms)[0].items():
        assert form.dtype == "bfloat16"
        if isinstance(form, lcq.forms.Form):
            np.testing.assert_array_equal(form.codes, flatten(like)[0][path].codes)
            assert form.dense().dtype == jnp.bfloat16


def test_a_resumed_run_is_the_run_that_was_not_stopped(problem, tx, plain, tmp_path):
    halfway = problem.train(tx, steps=4)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", {"params": halfway[0], "opt_state": halfway[1]})
        checkpointer.wait_until_finished()
        like = jax.eval_shape(lambda: {"params": problem.params, "opt_state": tx.init(problem.params)})
        restored = checkpointer.restore(tmp_path / "run", like)
    assert isinstance(restored["opt_state"], LCState)
    resumed = problem.train(tx, restored["params"], state=restored["opt_state"], steps=6)
    assert_same(resumed, plain)


def test_line_search_sees_the_coupling():
    """A line search is given value, grad and value_fn, and with those of the loss it would search another function."""
    key = jax.random.key(0)
    x, y = jax.random.normal(key, (64, 8)), jax.random.normal(jax.random.key(2), (64, 6))
    params = {"kernel": jax.random.normal(key, (8, 6)) * 0.5}

    def loss(p):
        return ((x @ p["kernel"] - y) ** 2).mean()

    mu = lcq.geometric(1e-2, 1.6, steps=20)
    tx = lcq.lc(optax.lbfgs(), [lcq.Rule("kernel", lcq.KMeans(2))], mu=mu, every=6)

    def step(carry, _):
        params, state = carry
        value, grad = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grad, state, params, value=value, grad=grad, value_fn=loss)
        return (optax.apply_updates(params, updates), state), None

    (params, state), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=160))((params, tx.init(params)))
    assert lcq.metrics(state)["gap"] < 1e-6


MASKED = {
    "prune": lcq.Prune(count=4),
    "codes": lcq.Prune(count=4, values=lcq.KMeans(2)),
    "sum": lcq.Additive(lcq.Binary(), lcq.Prune(count=2)),
    "cast": lcq.Cast("bfloat16"),
    "low rank": lcq.LowRank(1),
}


@pytest.mark.parametrize("scheme", MASKED)
@pytest.mark.parametrize("method", ["lc", "iterated_direct", "straight_through_training"])
def test_masks_survive_sharpness_aware_minimisation(scheme, method):
    """SAM mixes states by arithmetic, which makes int32 of bool: no array of a state is one."""
    params, rules = {"k": jnp.arange(1.0, 9.0).reshape(2, 4)}, [lcq.Rule("k", MASKED[scheme])]
    inner = optax.sgd(0.01)
    tx = {
        "lc": lambda: lcq.lc(inner, rules, mu=lcq.geometric(0.1, 1.5, steps=10), every=4),
        "iterated_direct": lambda: lcq.training.iterated_direct(inner, rules, every=4),
        "straight_through_training": lambda: lcq.training.straight_through_training(inner, rules),
    }[method]()
    assert not any(leaf.dtype == bool for leaf in jax.tree.leaves(tx.init(params)))
    tx = optax.contrib.sam(tx, optax.chain(optax.contrib.normalize(), optax.sgd(0.05)))
    state, update = tx.init(params), jax.jit(tx.update)
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(state)]
    for _ in range(20):
        updates, state = update(jax.tree.map(lambda a: a - 3, params), state, params)
        params = optax.apply_updates(params, updates)
        assert dtypes == [leaf.dtype for leaf in jax.tree.leaves(state)]
    assert update._cache_size() == 1 and np.isfinite(params["k"]).all()
    if method == "lc":
        forms = lcq.extract(state, params)
        if scheme in ("prune", "codes"):
            assert int((lcq.decompress(forms)["k"] != 0).sum()) <= 4
            assert forms["k"].unpack().mask.dtype == bool


def test_a_state_of_hemp_survives_arithmetic():
    """An infinity would: 0 inf is NaN."""
    params = {"k": jnp.linspace(-1, 1, 24).reshape(4, 6)}
    tx = lcq.hemp(optax.sgd(0.01), [lcq.Rule("k", lcq.KMeans(2))], order=1, small=0)
    tx = optax.contrib.sam(tx, optax.sgd(0.01))
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(4):
        updates, state = update(params, state, params)
        params = optax.apply_updates(params, updates)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert update._cache_size() == 1 and 0 < lcq.metrics(state)["entropy"] <= 1
