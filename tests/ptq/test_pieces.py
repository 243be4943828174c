"""What lies between two products: compiled once for all of its kind, evaluated once for each net, and dropped."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lcq.ptq import pieces
from lcq.ptq import two_stream as walking
from lcq.ptq.two_stream import walk
from lcq.tracing.param_flow import trace
from lcq.tree.paths import flatten


def draw(*shape, seed=0, scale=1.0):
    return jnp.asarray(np.random.default_rng(seed + sum(shape)).normal(size=shape) * scale, jnp.float32)


def data(*shape):
    return [draw(*shape, seed=100 + i) for i in range(2)]


def assert_near(got, wanted, tolerance):
    wanted = np.asarray(wanted, np.float32)
    np.testing.assert_allclose(np.asarray(got, np.float32), wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


def deep(layers):
    """Equal blocks, each with a residual that lives across its two products."""

    def fn(p, x):
        for up, down in zip(p["up"], p["down"], strict=True):
            x = x + jnp.tanh(jnp.tanh(x @ up) @ down)
        return x @ p["last"]

    up, down = ([draw(*shape, seed=i) for i in range(layers)] for shape in ((7, 9), (9, 7)))
    return fn, {"up": up, "down": down, "last": draw(7, 2)}


def passed(fn, params, batches, finish=lambda visit: visit.finish()):
    """Walks with every weight halved; yields after each visit."""
    original, _ = flatten(params)
    other = {path: leaf / 2 for path, leaf in original.items()}
    program = trace(fn, params, batches[0], list(original))
    for visit in walk(program, original, other, batches):
        finish(visit)
        yield visit


def compiled(layers, batches):
    """Pieces and products that are new to the caches."""
    caches = pieces._compiled, walking._multiplier
    for cache in caches:
        cache.cache_clear()
    for _ in passed(*deep(layers), batches):
        pass
    return [cache.cache_info().misses for cache in caches]


def test_compilations_depend_neither_on_batches_nor_on_depth():
    x = data(3, 7)[0]
    alone = compiled(3, [x])
    assert compiled(3, [x] * 4) == compiled(6, [x]) == alone
    # nothing (shared, and before the first product), inside of a block, from one to the next; up, down, last
    assert alone == [3, 3]


def test_function_is_traced_once():
    calls = []
    fn, params = deep(2)

    def counted(p, x):
        calls.append(isinstance(x, jax.core.Tracer))
        return fn(p, x)

    for _ in passed(counted, params, data(3, 7) * 2):
        pass
    assert calls == [True]


def test_only_what_is_needed_later_lives():
    fn, params = deep(3)
    names = len(jax.tree.leaves(params))
    live, seen = [], []

    def finish(visit):
        for pair in visit.inputs:
            seen.extend(map(weakref.ref, pair))
        visit.finish()

    for visit in passed(fn, params, data(3, 7), finish):
        live.append(max(len(env) for pair in visit._walk.parts[0].streams for env in pair) - names)
        del visit
    gc.collect()
    assert live == [1, 2] * 3 + [1]
    assert not any(ref() is not None for ref in seen)


def test_nets_are_one_until_the_first_product():
    """The same objects, and effects (a print) once for each batch; then once for each net, too."""
    seen = []

    def fn(p, x):
        for i, w in enumerate(p):
            jax.debug.callback(lambda _, i=i: seen.append(i), x.sum())
            x = jnp.sin(x) @ w
        return x

    for visit in passed(fn, [draw(4, 4, seed=i) for i in range(3)], data(5, 4)):
        assert [x is y for x, y in visit.inputs] == [visit.product.number == 0] * 2
        del visit
    jax.effects_barrier()
    assert sorted(seen) == [0] * 2 + [1] * 4 + [2] * 4


def test_layouts_of_equal_weights_are_kept_apart():
    """The same weights and dimension numbers, but inputs of another rank: a shift goes to other axes."""

    def fn(p, x):
        a = lax.dot_general(x, p["w"], (((0,), (0,)), ((), ())))  # [i, b, t] w[i, o] -> [b, t, o]
        return lax.dot_general(a.mean(1).T, p["v"], (((0,), (0,)), ((), ()))), a

    original, batches = {"w": draw(3, 3), "v": draw(3, 3)}, data(3, 3, 2)
    for visit in walk(trace(fn, original, batches[0], ["w", "v"]), original, dict(original), batches):
        shift = jnp.arange(3.0)[None]
        visit.finish(shift)
        for (_, y), (_, two) in zip(visit.inputs, visit.results[0], strict=True):
            moved = two - visit.product(y, original[visit.product.path])
            assert two.shape == visit.product.y.shape
            np.testing.assert_allclose(moved, np.broadcast_to(np.arange(3.0), two.shape), atol=1e-4)


NUMBERS = {
    "beside a variable": lambda x, i: x * (2.0 + i),
    "in a branch": lambda x, i: lax.cond(x[0, 0] > 0, lambda x: x * (2.0 + i), lambda x: x - i, x),
}


@pytest.mark.parametrize("case", NUMBERS)
def test_constants_and_leaves_beside(case):
    """Pieces that differ in a number only are two; the other net differs in a leaf without a product."""

    def fn(p, x):
        for i, w in enumerate(p["w"]):
            x = (NUMBERS[case](x, i) * jnp.exp(p["scale"])) @ w
        return x

    params = {"w": [draw(3, 3, seed=i) for i in range(3)], "scale": draw(3)}
    original, structure = flatten(params)
    other, batches = original | {"scale": draw(3, seed=9)}, data(4, 3)
    for visit in walk(trace(fn, params, batches[0], ["w/0", "w/1", "w/2"]), original, other, batches):
        assert not any(x is y for x, y in visit.inputs)
        visit.finish()
    for batch, results in zip(batches, visit.results[0], strict=True):
        for leaves, result in zip((original, other), results, strict=True):
            assert_near(result, fn(jax.tree.unflatten(structure, leaves.values()), batch), 1e-5)


def test_error_where_a_product_is_not_finished():
    fn, params = deep(1)
    with pytest.raises(RuntimeError, match="up/0: expected Visit"):
        for _ in passed(fn, params, data(3, 7), finish=lambda visit: None):
            pass
