"""Counts beyond 32 bits: limbs against Python's integers, with limbs of 8 bits; every scheme at ten billion weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lcq
from lcq.plans.text import format_scheme
from lcq.schemes import counts, topk
from lcq.schemes.grouped import cut
from lcq.schemes.kmeans import init, lloyd
from tests.schemes.test_contract import CASES

RNG = np.random.default_rng(0)
SHAPES = [(5, 3), (), (40, 30), (255,), (2, 3, 41), (17, 1, 16), (1, 1)]


@pytest.fixture
def short_limbs(monkeypatch):
    """Limbs of 8 bits, numbers below 2^12; cells are counted in 7 bits."""
    monkeypatch.setattr(counts, "LIMB", jnp.uint8)
    monkeypatch.setattr(counts, "WHOLE", jnp.int8)


def number(count):
    return int(count.high) * (1 << counts._half()) + int(count.low)


def test_arithmetic_of_limbs(short_limbs):
    pairs = [(0, 0), (15, 1), (16, 16), (256, 255), (4000, 95), (1000, 999), (512, 511)]
    for a, b in pairs:
        x, y = map(counts.count_of, (a, b))
        assert (number(counts.plus(x, y)), number(counts.minus(x, y))) == (a + b, a - b)
        assert bool(counts.at_least(x, y)) and bool(counts.at_least(y, x)) == (a == b)
        assert number(counts.smaller(x, y)) == b and float(counts.as_float(x, jnp.float32)) == a


def test_arithmetic_of_32_bits():
    a, b = 6_740_000_000, 4_294_967_297
    x, y = map(counts.count_of, (a, b))
    assert (number(counts.plus(x, y)), number(counts.minus(x, y))) == (a + b, a - b)
    assert number(counts.count_parts([jnp.int32(2**31 - 1)] * 5)) == 5 * (2**31 - 1)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_marks_are_counted_in_short_limbs(short_limbs, share):
    marks = [RNG.random(shape) < share for shape in SHAPES]
    assert number(counts.count_marks(map(jnp.asarray, marks))) == sum(int(m.sum()) for m in marks)


@pytest.mark.parametrize("law", ["distinct", "ties"])
def test_the_largest_by_short_limbs_are_the_first_of_a_stable_sort(short_limbs, law):
    draw = RNG.normal if law == "distinct" else functools.partial(RNG.integers, 0, 4)
    scores = [np.asarray(draw(size=shape), np.float32) for shape in SHAPES]
    flat = np.concatenate([s.ravel() for s in scores])
    find = jax.jit(lambda scores, count: topk.largest(scores, counts.Count(*count)))
    order = np.argsort(-abs(flat), kind="stable")
    for count in (0, 1, 300, 1234, flat.size - 1, flat.size):
        found = find(list(map(jnp.asarray, scores)), tuple(counts.count_of(count)))
        np.testing.assert_array_equal(
            np.flatnonzero(np.concatenate([np.ravel(f) for f in found])), sorted(order[:count])
        )


@pytest.mark.parametrize("masked", [False, True])
def test_cells_are_counted_in_short_numbers(short_limbs, masked):
    """Pieces of a leaf, put together from limbs: as floats, for these numbers the integers themselves."""
    xs = [jnp.asarray(RNG.normal(size=shape), jnp.float32) for shape in ((40, 30), (9, 5))]
    masks = tuple(jnp.asarray(RNG.random(x.shape) < 0.7) for x in xs)
    whole = cut(xs, None)._replace(importance=masks if masked else None)
    levels = jnp.linspace(-1, 1, 4)[None, None]
    codes = [lloyd.assign(x, levels) for x in whole.leaves]
    found = lloyd.cell_counts(whole, codes, levels)
    kept = [np.asarray(c)[np.asarray(m)] if masked else np.ravel(c) for c, m in zip(codes, masks, strict=True)]
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found[0, 0], np.bincount(np.concatenate(kept), minlength=4))


def test_a_histogram_of_floats_starts_as_one_of_integers(monkeypatch):
    x = jnp.asarray(RNG.normal(size=(300, 200)), jnp.float32)
    before = init.summarise(cut([x], None), 4)
    monkeypatch.setattr(counts, "WHOLE", jnp.int16)
    after = init.summarise(cut([x], None), 4)
    assert after[0].importance[0].dtype == jnp.float32 and before[0].importance[0].dtype == jnp.int32
    np.testing.assert_array_equal(after[0].importance[0], before[0].importance[0])
    np.testing.assert_allclose(after[1], before[1], rtol=1e-6)


ROWS = 100_352  # 2^11 x 49, so that there is a rotation
HUGE = jax.ShapeDtypeStruct((ROWS, ROWS), "float32")
TRACEABLE = {format_scheme(scheme): scheme for scheme in CASES if not scheme.host}
FOR_ALL = {
    name: scheme
    for name, scheme in TRACEABLE.items()
    if not any(per is not None for per in scheme.cuts) or "group" in {f.name for f in dataclasses.fields(scheme)}
}


@pytest.mark.parametrize("name", TRACEABLE)
def test_ten_billion_weights_in_one_leaf(name):
    scheme = dataclasses.replace(TRACEABLE[name], m=4) if isinstance(TRACEABLE[name], lcq.NofM) else TRACEABLE[name]
    if (2, 3) in scheme.cuts:
        scheme = dataclasses.replace(scheme, group=(2, 4))
    form = jax.eval_shape(functools.partial(scheme.project, mu=1.0), HUGE)
    assert jax.eval_shape(form.__class__.dense, form).shape == HUGE.shape and form.bits > 0


@pytest.mark.parametrize("name", [name for name in FOR_ALL if "(2, 3)" not in name])
def test_ten_billion_weights_in_a_joint_task(name):
    leaves = (jax.ShapeDtypeStruct((ROWS >> 1, ROWS), "bfloat16"),) * 2
    forms = jax.eval_shape(functools.partial(FOR_ALL[name].project, mu=1.0), leaves)
    assert [form.shape for form in forms] == [leaf.shape for leaf in leaves]


def test_a_joint_budget_of_ten_billion_weights_in_training():
    params = {f"w{i}": jax.ShapeDtypeStruct((50_000, 100_000), "bfloat16") for i in range(2)}
    rules = [lcq.Rule("w.", lcq.Prune(fraction=0.1), joint=True)]
    tx = lcq.lc(optax.sgd(0.1), rules, mu=lcq.geometric(1.0, 1.1, steps=9), every=5)
    state = jax.eval_shape(tx.init, params)
    updates, _ = jax.eval_shape(tx.update, params, state, params)
    assert updates["w1"].shape == params["w1"].shape
