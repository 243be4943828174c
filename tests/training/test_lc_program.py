"""What `update` compiles to: no callbacks, exact products, little memory."""

import jax
import jax.numpy as jnp
import optax
import pytest

import lcq

SCHEMES = {
    "k-means per channel": lcq.KMeans(4, per="channel"),
    "large k-means": lcq.KMeans(64),
    "ternary": lcq.Ternary(),
    "powers of two": lcq.PowersOfTwo(3, scale=True, per=8),
    "uniform": lcq.Uniform(4, zero_point=True),
    "cast": lcq.Cast("bfloat16"),
    "pruned": lcq.L1Ball(9.0, group="channel"),
    "ranks": lcq.LowRank(penalty=1e-3),
    "sum": lcq.Additive(lcq.LowRank(2), lcq.Prune(count=9)),
}


def program(scheme, shape=(64, 32), **settings):
    tx = lcq.lc(
        **{"inner": optax.sgd(0.1)} | settings,
        rules=[lcq.Rule("w", scheme)],
        mu=lcq.geometric(0.1, 1.1, steps=9),
        every=5,
    )
    params = {"w": jax.random.normal(jax.random.key(0), shape)}
    return tx, params, tx.init(params)


def equations(jaxpr):
    """All equations of a jaxpr and of the jaxprs in their parameters."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def outside_calls(walked):
    words = {"callback", "print", "infeed", "outfeed"}
    return {e.primitive.name for e in walked if words & set(e.primitive.name.split("_"))}


@pytest.mark.parametrize("name", SCHEMES)
def test_update_calls_nothing_back_and_multiplies_exactly(name):
    coupling = "proximal" if name == "ternary" else "gradient"
    tx, params, state = program(SCHEMES[name], inner=optax.sgd, learning_rate=0.1, coupling=coupling)
    found = list(equations(jax.make_jaxpr(tx.update)(params, state, params)))
    assert len(found) > 50 and not outside_calls(found)
    for equation in found:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            assert set(equation.params["precision"]) == {jax.lax.Precision.HIGHEST}, equation


def test_the_walk_sees_callbacks_and_dots_at_any_depth():
    def inner(x):
        jax.debug.print("{}", x[0])
        return jnp.dot(x, x) * x

    deep = jax.make_jaxpr(lambda x: jax.lax.cond(x[0] > 0, jax.jit(inner), lambda x: x, x))
    walked = list(equations(deep(jnp.ones(3))))
    assert len(outside_calls(walked)) == 1
    assert [e.params["precision"] for e in walked if e.primitive.name == "dot_general"] == [None]


@pytest.mark.parametrize("scheme, copies", [(lcq.KMeans(4), 4.75), (lcq.Ternary(), 4)], ids=["k-means", "ternary"])
def test_memory(scheme, copies):
    """Resident: at most 1.3 copies of the weights. A C step: at most 4 of its largest task (k-means misses that), tasks
    one after another."""
    params = {name: jax.random.normal(jax.random.key(0), (512, 256)) for name in ("w0", "w1", "w2")}
    tx = lcq.lc(optax.sgd(0.1), [lcq.Rule("w.", scheme)], mu=1.0, every=None)
    state = tx.init(params)
    resident = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert resident <= 1.3 * sum(leaf.nbytes for leaf in params.values())
    program = jax.jit(lcq.training.c_step, donate_argnums=0).lower(state, params).compile().memory_analysis()
    assert (
        program.temp_size_in_bytes <= copies * params["w0"].nbytes + 150_000
    )  # the sample that a scale is first sought on
