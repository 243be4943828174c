"""What a wrapper is given: shape structs, gradients that are missing, states without their types, odd leaves."""

import flax.serialization as fs
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import lcq

W = jnp.asarray(np.random.default_rng(0).normal(size=(6, 8)), jnp.float32)
PARAMS = {"kernel": W, "bias": jnp.ones(8)}


def rules(pattern="kernel", scheme=None):
    return [lcq.Rule(pattern, scheme or lcq.KMeans(2))]


def lc(pattern="kernel", **changes):
    settings = {"mu": 1.0, "every": 2} | changes
    return lcq.lc(optax.adam(1e-2), rules(pattern, settings.pop("scheme", None)), **settings)


MAKERS = {
    "lc": lc,
    "lc, proximal": lambda pattern="kernel": lcq.lc(
        optax.sgd, rules(pattern), mu=1.0, every=2, learning_rate=0.1, coupling="proximal"
    ),
    "hemp": lambda pattern="kernel": lcq.hemp(optax.adam(1e-2), rules(pattern), order=2, small=0, every=2),
    "iterated_direct": lambda pattern="kernel": lcq.training.iterated_direct(optax.adam(1e-2), rules(pattern), every=2),
    "straight_through_training": lambda pattern="kernel": lcq.training.straight_through_training(
        optax.adam(1e-2), rules(pattern)
    ),
}


def same_shapes(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


@pytest.mark.parametrize("name", MAKERS)
def test_abstract_initialisation(name):
    tx = MAKERS[name]()
    same_shapes(tx.init(jax.eval_shape(lambda: PARAMS)), jax.eval_shape(tx.init, PARAMS))
    same_shapes(tx.init(jax.eval_shape(lambda: PARAMS)), tx.init(PARAMS))
    mixed = {"kernel": jax.ShapeDtypeStruct(W.shape, W.dtype), "bias": PARAMS["bias"]}
    same_shapes(tx.init(mixed), tx.init(PARAMS))
    alone = MAKERS[name](".*")
    same_shapes(alone.init(jax.ShapeDtypeStruct(W.shape, W.dtype)), alone.init(W))


@pytest.mark.parametrize(
    "scheme",
    [lcq.KMeans(2, exact=True), lcq.Prune(count=5), lcq.LowRank(2), lcq.L0Penalty(0.1), lcq.Cast("bfloat16")],
)
def test_abstract_initialisation_of_any_scheme(scheme):
    tx = lc(scheme=scheme, every=None)
    same_shapes(tx.init(jax.eval_shape(lambda: PARAMS)), tx.init(PARAMS))


def test_abstract_weights_are_made_binary_abstractly():
    binary = lcq.smooth_binary([lcq.Rule("kernel", lcq.Binary(per="channel"))])
    shapes = jax.eval_shape(lambda: PARAMS)
    same_shapes(binary.alphas(shapes), binary.alphas(PARAMS))
    same_shapes(binary(shapes, 0.5), binary(PARAMS, 0.5))
    same_shapes(binary(shapes, 0.5, binary.alphas(shapes)), binary(PARAMS, 0.5))
    same_shapes(binary.compress(shapes), binary.compress(PARAMS))


@pytest.mark.parametrize("name", MAKERS)
def test_an_update_without_a_gradient(name):
    tx = MAKERS[name]()
    state = tx.init(PARAMS)
    for grads in ({"kernel": None, "bias": jnp.ones(8)}, {"bias": jnp.ones(8)}, None):
        with pytest.raises(
            ValueError, match=r"kernel: expected the gradient of the loss, got none; .*lcq.Rule\('kernel'"
        ):
            tx.update(grads, state, PARAMS)
    with pytest.raises(ValueError, match=r"kernel: expected the gradient.* \[6, 8\], got float32\[2, 6, 8\]"):
        tx.update(jax.tree.map(lambda w: jnp.stack([w, w]), PARAMS), state, PARAMS)
    with pytest.raises(ValueError, match=r"kernel: expected the parameters that .* was given in init"):
        tx.update(PARAMS, state, {"bias": PARAMS["bias"]})
    if name in ("iterated_direct", "straight_through_training"):  # they move every leaf themselves
        with pytest.raises(ValueError, match="bias: expected the gradient of the loss, got none"):
            tx.update({"kernel": W, "bias": None}, state, PARAMS)


@pytest.mark.parametrize("name", MAKERS)
def test_a_tree_that_is_one_leaf(name):
    tx = MAKERS[name](".*")
    state = tx.init(W)
    for _ in range(3):
        updates, state = jax.jit(tx.update)(W, state, W)
    assert updates.shape == W.shape and np.isfinite(updates).all()
    with pytest.raises(ValueError, match=r"^the only leaf: expected the gradient"):
        tx.update(None, state, W)


@pytest.mark.parametrize("name", MAKERS)
def test_leaves_that_are_no_arrays_and_empty_ones(name):
    tx = MAKERS[name]()
    if name == "lc, proximal":  # SGD keeps nothing of a leaf, and lc nothing of this one
        assert tx.init(PARAMS | {"act": jax.nn.relu}).lagrangian.multipliers["act"] == optax.MaskedNode()
    else:
        with pytest.raises(ValueError, match=r"^act: expected an array, got \w+, .*optax.masked"):
            tx.init(PARAMS | {"act": jax.nn.relu})
    with pytest.raises(ValueError, match=r"kernel: .*got int"):
        tx.init(PARAMS | {"kernel": 3})
    empty = PARAMS | {"nothing": jnp.zeros((0, 3))}
    updates, _ = tx.update(empty, tx.init(empty), empty)
    assert updates["nothing"].shape == (0, 3)
    with pytest.raises(ValueError, match=r"kernel: .*at least one"):
        tx.init(PARAMS | {"kernel": jnp.zeros((0, 3))})


def through_msgpack(state, _):
    return fs.msgpack_restore(fs.to_bytes(state))


def through_orbax(state, folder):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "state")


def as_lists(state, _):
    return jax.tree.leaves(state)


@pytest.mark.parametrize("restore", [through_msgpack, through_orbax, as_lists])
@pytest.mark.parametrize("name", MAKERS)
def test_a_state_that_was_restored_without_a_target(name, restore, tmp_path):
    tx = MAKERS[name]()
    state = tx.init(PARAMS)
    plain = restore(state, tmp_path)
    remedy = r"plain dicts and lists: restore into tx.init\(params\)"
    with pytest.raises(ValueError, match=remedy):
        tx.update(PARAMS, plain, PARAMS)
    with pytest.raises(ValueError, match=remedy):
        lcq.metrics(plain)
    for function in (lcq.extract, *((lcq.training.c_step,) if name == "lc" else ())):
        with pytest.raises(ValueError, match=remedy):
            function(plain, PARAMS)


def test_a_state_that_lost_its_types_inside():
    tx, chained = lc(), optax.chain(optax.clip(1.0), lc())
    state = tx.init(PARAMS)
    remedy = r"a .* of plain dicts and lists; .*restore into tx.init\(params\)"
    for lost in (
        state._replace(lagrangian=state.lagrangian._asdict()),
        state._replace(lagrangian=state.lagrangian._replace(problem={})),
        state._replace(lagrangian=state.lagrangian._replace(codebooks=[[{"levels": jnp.ones((1, 1, 2))}]])),
        state._replace(lagrangian=state.lagrangian._replace(codes=[{"kernel": jnp.ones(3)}])),
    ):
        with pytest.raises(ValueError, match=remedy):
            tx.update(PARAMS, lost, PARAMS)
    with pytest.raises(ValueError, match=remedy):
        lcq.extract((state._replace(lagrangian=state.lagrangian._replace(problem={})),), PARAMS)
    inside = chained.init(PARAMS)
    with pytest.raises(ValueError, match=r"got dict; .*restore into tx.init\(params\)"):
        chained.update(PARAMS, (inside[0], inside[1]._asdict()), PARAMS)
    tx = MAKERS["hemp"]()
    with pytest.raises(ValueError, match=remedy):
        tx.update(PARAMS, tx.init(PARAMS)._replace(tasks=[]), PARAMS)


@pytest.mark.parametrize("name", MAKERS)
def test_a_state_that_was_restored_into_one_goes_on(name):
    tx = MAKERS[name]()
    _, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    back = fs.from_bytes(tx.init(PARAMS), fs.to_bytes(state))
    for a, b in zip(*(jax.tree.leaves(tx.update(PARAMS, s, PARAMS)) for s in (state, back)), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), atol=1e-6)


SCHEMES = [
    lcq.KMeans(2),
    lcq.Cast("bfloat16"),
    lcq.LowRank(1),
    lcq.Prune(count=3),
    lcq.Additive(lcq.KMeans(2), lcq.Prune(count=2)),
]


WRAPPERS = {
    "lc": lambda inner, rules: lcq.lc(inner, rules, mu=0.1, every=2),
    "iterated direct": lambda inner, rules: lcq.training.iterated_direct(inner, rules, every=2),
    "straight-through": lcq.training.straight_through_training,
}
DOORS = {
    "save": lambda tree: lcq.save("net.lcq", tree),
    "decompress": lcq.decompress,
    "table": lcq.table,
    "packed": lambda tree: lcq.packed(lambda p, x: x)(tree, 1.0),
    "export": lambda tree: lcq.io.export(tree, "net", format="compressed-tensors"),
}


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_state_is_not_what_is_saved(scheme, name, tmp_path, monkeypatch):
    """Whatever forms it holds, in one part or in two, alone and beside the parameters."""
    monkeypatch.chdir(tmp_path)
    state = WRAPPERS[name](optax.sgd(0.1), [lcq.Rule("kernel", scheme)]).init(PARAMS)
    words = r"{}: expected forms or arrays, got an optimizer state, .*; call lcq.extract\(state, params\)"
    with pytest.raises(ValueError, match=words.format("lagrangian" if name == "lc" else "the tree")):
        DOORS["save"](state)
    for door in DOORS.values() if scheme == SCHEMES[0] else [DOORS["save"]]:
        with pytest.raises(ValueError, match=words.format("opt.*")):
            door({"params": PARAMS, "opt": state})
    assert not list(tmp_path.iterdir())


def test_codebooks_of_a_state_are_not_what_is_saved(tmp_path):
    with pytest.raises(ValueError, match=r"0: expected forms or arrays, got an optimizer state, .*; call lcq.extract"):
        lcq.save(tmp_path / "net.lcq", lc().init(PARAMS).lagrangian.codebooks)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("scheme", [lcq.KMeans(2), lcq.LowRank(2)])
def test_parameters_of_another_shape(scheme):
    """Whatever the form, and with or without multipliers, before anything is computed."""
    larger = {"kernel": jnp.ones((6, 9)), "bias": PARAMS["bias"]}
    for multipliers in (True, False):
        tx = lc(scheme=scheme, multipliers=multipliers)
        state = tx.init(PARAMS)
        words = r"kernel: expected the shape \[6, 8\] that lc was given in init, got float32\[6, 9\]; call init"
        for function in (
            lambda tx=tx, state=state: jax.eval_shape(tx.update, larger, state, larger),
            lambda state=state: lcq.training.c_step(state, larger),
            lambda state=state: lcq.extract(state, larger),
        ):
            with pytest.raises(ValueError, match=words):
                function()


OTHER = {
    "lc": lambda scheme: lc(scheme=scheme),
    "hemp": lambda scheme: lcq.hemp(optax.adam(1e-2), rules(scheme=scheme), order=2, small=0, every=2),
    "iterated_direct": lambda scheme: lcq.training.iterated_direct(optax.adam(1e-2), rules(scheme=scheme), every=2),
    "straight_through_training": lambda scheme: lcq.training.straight_through_training(
        optax.adam(1e-2), rules(scheme=scheme)
    ),
}


@pytest.mark.parametrize("name", OTHER)
def test_a_state_of_other_rules_is_refused(name):
    """A second phase with a tighter scheme on the state of the first: the first scheme went on, without a word."""
    state = OTHER[name](lcq.KMeans(4)).init(PARAMS)
    OTHER[name](lcq.KMeans(4)).update(PARAMS, state, PARAMS)
    with pytest.raises(ValueError, match=r"kernel: the state of .* was made for KMeans\(k=4.*KMeans\(k=2.*tx.init"):
        OTHER[name](lcq.KMeans(2)).update(PARAMS, state, PARAMS)
    more = lcq.training.iterated_direct(optax.sgd(0.1), [lcq.Rule("kernel|bias", lcq.KMeans(2), joint=True)], every=2)
    less = lcq.training.iterated_direct(optax.sgd(0.1), [lcq.Rule("kernel|bias", lcq.KMeans(2))], every=2)
    alone = lcq.training.iterated_direct(optax.sgd(0.1), rules(), every=2)
    with pytest.raises(ValueError, match=r"bias: .* joint for .*'bias', 'kernel'"):
        less.update(PARAMS, more.init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match=r"bias: .* made for no scheme, its rules now say KMeans"):
        less.update(PARAMS, alone.init(PARAMS), PARAMS)


def test_a_state_of_other_penalty_weights_is_refused_and_its_numbers_are_taken_over():
    """Its multipliers would follow the old penalty weights, and the coupling the new ones."""
    first = lc(mu=lcq.geometric(0.1, 1.5, steps=9))
    state = first.init(PARAMS)
    for _ in range(5):
        _, state = first.update(PARAMS, state, PARAMS)
    second = lc(mu=lcq.geometric(0.1, 1.2, steps=9))
    with pytest.raises(ValueError, match=r"mu=Geometric.*factor=1.5.*mu=Geometric.*factor=1.2.*jax.tree.unflatten"):
        second.update(PARAMS, state, PARAMS)
    state = jax.tree.unflatten(jax.tree.structure(second.init(PARAMS)), jax.tree.leaves(state))
    _, state = second.update(PARAMS, state, PARAMS)
    np.testing.assert_allclose(lcq.metrics(state)["penalty_weight"], 0.1 * 1.2**2, rtol=1e-6)


def test_penalty_weights_by_functions_that_are_made_again_are_the_same():
    def scheduled(start):
        ends = [optax.constant_schedule(start), lambda k: start * 2.0**k]
        return lc(mu=optax.join_schedules(ends, [3]))

    state = scheduled(0.1).init(PARAMS)
    scheduled(0.1).update(PARAMS, state, PARAMS)
    with pytest.raises(ValueError, match="the state of lc was made for mu="):
        scheduled(0.2).update(PARAMS, state, PARAMS)


@pytest.mark.parametrize("name", [name for name in OTHER if name != "straight_through_training"])
def test_states_of_an_ensemble_are_refused_where_they_are_not_mapped_over(name):
    tx, members = OTHER[name](lcq.KMeans(2)), jax.tree.map(lambda w: jnp.stack([w, 2 * w]), PARAMS)
    states, says = jax.vmap(tx.init)(members), "expected the state of one run of .*, got those of 2: .*jax.vmap"
    with pytest.raises(ValueError, match=says):
        tx.update(members, states, members)
    with pytest.raises(ValueError, match=says):
        jax.jit(tx.update)(members, states, members)
    if name == "hemp":
        return  # levels are looked up in each member's own
    with pytest.raises(ValueError, match=says):
        lcq.extract(states, members)
    one = jax.tree.map(lambda a: a[1], (states, members))
    assert lcq.extract(*one)["kernel"].shape == W.shape


@pytest.mark.parametrize(
    "old, new",
    [
        (lcq.Prune(count=9), lcq.Prune(fraction=0.1)),
        (lcq.Uniform(4), lcq.Uniform(2)),
        (lcq.LowRank(4), lcq.LowRank(1)),
        (lcq.Levels((-1.0, 1.0)), lcq.Levels((-2.0, 2.0))),
        (lcq.KMeans(2), lcq.KMeans(4)),
    ],
)
def test_a_checkpoint_of_other_rules_is_refused_in_words(old, new):
    """flax restores whatever shapes there are: factors of rank 4 were added up with those of rank 1."""
    saved = fs.to_bytes(lc(scheme=old).init(PARAMS))
    tx = lc(scheme=new, every=1)
    state = fs.from_bytes(tx.init(PARAMS), saved)
    with pytest.raises(ValueError, match=r"kernel: expected the state of .*other settings.*state = tx.init\(params\)"):
        for _ in range(2):
            _, state = jax.jit(tx.update)(PARAMS, state, PARAMS)


def test_penalty_weights_by_a_function_under_inject_hyperparams():
    """It makes `lc` again in a trace, where the first weight was looked at and had no value."""

    def made(learning_rate):
        return lcq.lc(optax.adam(learning_rate), rules(), mu=lambda k: 0.1 * 2.0**k, every=1)

    tx = optax.inject_hyperparams(made)(learning_rate=1e-2)
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    for _ in range(4):
        _, state = update(PARAMS, state, PARAMS)
    assert update._cache_size() == 1
    np.testing.assert_allclose(lcq.metrics(state)["penalty_weight"], 0.8, rtol=1e-6)
