"""Viterbi against all paths there are, and what the C step on a trellis does beside it."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lcq
from lcq.schemes.trellis import viterbi
from lcq.schemes.trellis.viterbi import best_paths, better_paths, overlap_of, tail_biting

RNG = np.random.default_rng(0)


def paths(length, bits, memory, overlap):
    """The states of all paths that begin after an overlap."""
    for codes in itertools.product(range(1 << bits), repeat=length):
        state, states = overlap, []
        for code in codes:
            state = (state * 2**bits + code) % 2**memory
            states.append(state)
        yield states


def least(v, g, table, bits, memory, overlap):
    """The least error of all paths, in float64; those that bite their tail if an overlap is given."""
    size, errors = 1 << (memory - bits), []
    for start in range(size) if overlap is None else [overlap]:
        for states in paths(len(v), bits, memory, start):
            if overlap is None or states[-1] % size == overlap:
                errors.append(((v - g * table[states]) ** 2).sum())
    return min(errors)


def follows(states, bits, memory, overlap):
    before = [overlap, *states[:-1]]
    return all(s >> bits == b % (1 << (memory - bits)) for b, s in zip(before, states, strict=True))


@pytest.mark.parametrize(
    ("bits", "memory", "length"),
    [(1, 1, 4), (1, 3, 7), (1, 4, 5), (2, 3, 4), (2, 4, 4), (2, 5, 4), (3, 4, 3), (3, 3, 3)],
)
def test_no_path_is_better(bits, memory, length):
    table = RNG.normal(size=1 << memory).astype(np.float32)
    v, g = (RNG.normal(size=(length, 5)).astype(np.float32) for _ in range(2))
    overlaps = RNG.integers(0, 1 << (memory - bits), 5)
    free = np.asarray(best_paths(*map(jnp.asarray, (v, g, table)), None, bits))
    bound = np.asarray(best_paths(*map(jnp.asarray, (v, g, table, [overlaps] * 2)), bits))
    wide = [a.astype(np.float64) for a in (v, g, table)]
    for i in range(5):
        for states, overlap in ((free[:, i], None), (bound[:, i], int(overlaps[i]))):
            error = ((wide[0][:, i] - wide[1][:, i] * wide[2][states]) ** 2).sum()
            wanted = least(wide[0][:, i], wide[1][:, i], wide[2], bits, memory, overlap)
            assert error == pytest.approx(wanted, rel=1e-5, abs=1e-9)
        assert follows(bound[:, i], bits, memory, int(overlaps[i]))
        assert bound[-1, i] % (1 << (memory - bits)) == overlaps[i]


def test_chunks_do_not_matter(monkeypatch):
    table = jnp.asarray(RNG.normal(size=32), jnp.float32)
    v, g = (jnp.asarray(RNG.normal(size=(9, 7)), jnp.float32) for _ in range(2))
    whole = best_paths(v, g, table, None, 2)
    monkeypatch.setattr(viterbi, "_LANES", 3)
    np.testing.assert_array_equal(best_paths(v, g, table, None, 2), whole)
    monkeypatch.setattr(viterbi, "_MEMORY", 1)
    np.testing.assert_array_equal(best_paths(v, g, table, None, 2), whole)


def test_a_later_beginning_is_as_a_shorter_path_and_stays_out_of_the_loop_over_states():
    """As a `where` it would be in that loop, which XLA then does not vectorize."""
    rng, table = np.random.default_rng(0), jnp.asarray(np.random.default_rng(1).normal(size=64), jnp.float32)
    v, ends = jnp.asarray(rng.normal(size=(9, 5)), jnp.float32), jnp.asarray(rng.integers(0, 16, (2, 5)))
    skipping = jax.jit(lambda v, skip: best_paths(v, jnp.ones_like(v), table, ends, 2, skip))
    np.testing.assert_array_equal(
        skipping(v, jnp.int32(3))[3:], best_paths(v[3:], jnp.ones_like(v[3:]), table, ends, 2)
    )
    assert " conditional(" in skipping.lower(v, jnp.int32(3)).compile().as_text()


def test_tails_are_bitten_and_turns_never_raise_the_error():
    bits, memory, length = 2, 6, 24
    table = jnp.asarray(RNG.normal(size=1 << memory), jnp.float32)
    v, g = jnp.asarray(RNG.normal(size=(length, 16)), jnp.float32), jnp.ones((length, 16))

    def error(states):
        return np.asarray(((v - g * table[states]) ** 2).sum(0))

    free = error(best_paths(v, g, table, None, bits))
    states = tail_biting(v, g, table, bits)
    for _ in range(2):
        for i in range(16):
            assert follows(np.asarray(states)[:, i].astype(int), bits, memory, int(overlap_of(states, table, bits)[i]))
        assert (free <= error(states) + 1e-5).all()
        better = better_paths(states, v, g, table, bits)
        assert (error(better) <= error(states) + 1e-5).all()
        states = better
    assert error(states).sum() < 1.25 * free.sum()


@pytest.mark.parametrize(
    ("scheme", "most"),
    [
        (lcq.Trellis(1, memory=8), 0.315),
        (lcq.Trellis(2, memory=8), 0.0895),
        (lcq.Trellis(2, memory=8, code="gaussian"), 0.0895),
        (lcq.Trellis(2, memory=6, code="learned"), 0.097),
    ],
    ids=repr,
)
def test_a_gaussian_has_less_error_than_any_codebook_makes(scheme, most):
    x = np.random.default_rng(1).normal(size=(256, 48)).astype(np.float32)
    form = scheme.project(jnp.asarray(x))
    error = ((x - np.asarray(form.dense())) ** 2).mean()
    assert error < most
    levels, dense = np.asarray(form.levels(), np.float64), np.asarray(form.dense(), np.float64)
    if scheme.code != "learned":
        assert (levels * x).sum() / (levels**2).sum() == pytest.approx(float(form.scale.reshape(())), rel=1e-5)
    else:
        states = np.asarray(form.states()).reshape(256, 48)
        for state in range(0, 64, 7):
            inside = x[states == state].astype(np.float64)
            assert not inside.size or inside.mean() == pytest.approx(dense[states == state].mean(), abs=2e-3)


def test_scales_are_chosen_in_their_format_and_may_be_of_groups_along_paths():
    x = RNG.normal(size=(64, 8)) * np.repeat([1e-3, 1.0, 30.0, 1.0], 16)[:, None]
    for per, dtype, count in ((16, "bfloat16", 32), ("channel", "float32", 8), ((16, 0), "float32", 4)):
        form = lcq.Trellis(2, memory=6, per=per).project(jnp.asarray(x, jnp.float32))
        assert form.scale.dtype == dtype and form.scale.size == count
        if per != "channel":
            error = ((x - np.asarray(form.dense())) ** 2).reshape(4, 16, 8).mean((1, 2)) / (x**2).reshape(
                4, 16, 8
            ).mean((1, 2))
            assert (error < 0.25).all()
    half = lcq.Trellis(2, memory=6, per=16, scale_dtype="float16").project(jnp.asarray(x, jnp.float32))
    assert half.scale.dtype == "float16"


def test_other_layouts():
    w = jnp.asarray(RNG.normal(size=(3, 2, 5, 4)), jnp.float32)
    plain = lcq.Trellis(2, memory=5, per="channel")
    there = plain.oriented("oihw", 4)
    assert there.along == (-3, -2, -1) and there.per == (1, 0, 0, 0)
    same = there.project(w.transpose(3, 2, 0, 1))
    other = dataclasses.replace(plain, along=(-2, -4, -3)).project(w)
    np.testing.assert_allclose(same.dense(), other.dense().transpose(3, 2, 0, 1), rtol=1e-5, atol=1e-6)
    assert plain.oriented("ioo", 3).along == (-3,)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (1, 4), (2, 1, 1, 3)])
def test_few_weights(shape):
    x = jnp.asarray(RNG.normal(size=shape), jnp.float32)
    for bits in (1, 3):
        form = lcq.Trellis(bits).project(x)
        assert form.shape == shape and bool(jnp.isfinite(form.dense()).all())
        assert form.memory <= max(bits * form.length, bits) and form.pack().bits == bits * x.size + 32
        form.pack().check_stored()


def test_zeros_are_zero_and_numbers_of_any_size_are_defined():
    assert not lcq.Trellis(2, memory=6).project(jnp.zeros((8, 3))).dense().any()
    x = jnp.asarray(RNG.normal(size=(32, 3)), jnp.float32)
    plain = lcq.Trellis(2, memory=6, per="channel").project(x).dense()
    for size in (2.0**-100, 2.0**100):
        np.testing.assert_allclose(
            lcq.Trellis(2, memory=6, per="channel").project(x * size).dense() / size, plain, 1e-5
        )
    start = lcq.Trellis(2, memory=6).project(jnp.zeros((32, 3)))
    again = lcq.Trellis(2, memory=6).project(x, start).dense()
    assert float(((again - x) ** 2).mean()) < 0.35


def test_pieces_of_long_paths_are_apart():
    x = jnp.asarray(RNG.normal(size=(64, 2)), jnp.float32)
    form = lcq.Trellis(2, memory=6, block=16).project(x)
    assert form.length == 16
    half = lcq.Trellis(2, memory=6, block=16).project(x.at[32:].set(0), form)
    moved = dataclasses.replace(half, steps=half.steps.at[32:].set(0)).dense()
    np.testing.assert_array_equal(moved[:32], half.dense()[:32])


def test_an_importance_is_worth_what_it_says():
    x = jnp.asarray(RNG.normal(size=(128, 4)), jnp.float32)
    h = jnp.where(jnp.arange(128) % 2, 1.0, 50.0)[:, None]
    scheme = lcq.Trellis(2, memory=8)
    plain, heavy = (
        ((x - scheme.project(x, importance=i).dense()) ** 2).reshape(64, 2, 4).mean((0, 2)) for i in (None, h)
    )
    assert heavy[0] < 0.5 * plain[0] and heavy[1] > plain[1]


def test_as_the_c_step_of_lc():
    w = {"kernel": jnp.asarray(RNG.normal(size=(32, 4)), jnp.float32)}
    target = w["kernel"] + 0.1
    tx = lcq.lc(
        optax.sgd(0.1), [lcq.Rule("kernel", lcq.Trellis(2, memory=6))], mu=lcq.geometric(0.1, 1.5, steps=12), every=5
    )
    state, update = tx.init(w), jax.jit(tx.update)
    for _ in range(60):
        updates, state = update({"kernel": w["kernel"] - target}, state, w)
        w = optax.apply_updates(w, updates)
    assert float(lcq.metrics(state)["gap"]) < 0.01
    assert float(((lcq.extract(state, w)["kernel"].dense() - target) ** 2).mean()) < 0.15


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bits": 0}, "expected bits from 1 to 8, got 0"),
        ({"bits": 2, "memory": 17}, "expected memory from 2 to 16, got 17"),
        ({"bits": 3, "memory": 2}, "expected memory from 3 to 16, got 2"),
        ({"bits": 2, "code": "random"}, "expected code= one of computed, gaussian, learned, got 'random'"),
        ({"bits": 2, "block": 0}, "expected block= a number of weights"),
        ({"bits": 2, "along": (0,)}, "expected along= distinct axes counted from the end"),
        ({"bits": 2, "scale_dtype": "int8"}, "scale_dtype: expected"),
    ],
)
def test_settings_are_checked(settings, words):
    with pytest.raises(ValueError, match=words):
        lcq.Trellis(**settings)
    with pytest.raises(ValueError, match=r"along=.* needs at least 3 axes"):
        lcq.Trellis(2, along=(-3,)).project(jnp.ones((4, 4)))
