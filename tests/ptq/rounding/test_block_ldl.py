"""Block LDL and descent on blocks, against least squares re-solved and all paths tried, in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lcq
from lcq.forms.state_values import table_of
from lcq.ptq.rounding import GPFQ, GPTQ, BlockLDL, Descent, Qronos, base
from lcq.ptq.rounding.paths import Blocks, descend, in_blocks
from lcq.ptq.statistics import finish, gather
from tests.ptq.rounding.oracles import path_error, problem

BITS, MEMORY = 1, 3
OVERLAP = (1 << (MEMORY - BITS)) - 1
VALUES = table_of(MEMORY, "computed").astype(np.float64)
BLOCKS = Blocks(3, 2)
SPAN = sum(BLOCKS)


def posed(size=12, neurons=5, seed=0):
    """v, A and scales of correlated inputs."""
    w, x, _ = problem(60, size, neurons, seed=seed)
    gram = x.astype(np.float64).T @ x + 0.05 * (x.astype(np.float64) ** 2).sum() / size * np.eye(size)
    scale = np.random.default_rng(seed).uniform(0.7, 1.3, (1, neurons)).astype(np.float32)
    return w, gram.astype(np.float32), scale


def of(w, scale, length, steps=None):
    steps = np.zeros(w.shape, np.uint8) if steps is None else steps
    how = {"width": BITS, "memory": MEMORY, "along": (-2,), "length": length}
    return lcq.forms.Trellis(jnp.asarray(steps), jnp.asarray(scale), **how)


def walked(before, codes):
    """States after an overlap, by codes."""
    states = []
    for code in codes:
        before = ((before << BITS) | code) & (2**MEMORY - 1)
        states.append(before)
    return np.array(states)


def best(z, weight, scale, before, after):
    """The states of least error of all paths; from any overlap, and to any, where that is None."""
    tried = []
    for start in range(OVERLAP + 1) if before is None else [before]:
        for codes in itertools.product(range(2**BITS), repeat=len(z)):
            states = walked(start, codes)
            if after is None or states[-1] & OVERLAP == after:
                tried.append(((weight * (z - scale * VALUES[states]) ** 2).sum(), tuple(states)))
    return np.array(min(tried)[1])


def literal(v, gram, scale, length):
    """Block after block: all inputs after it are solved again by least squares, what they leave is its weight."""
    v, gram, states = v.astype(np.float64), gram.astype(np.float64), np.zeros(v.shape, int)
    for n, start in itertools.product(range(v.shape[1]), range(0, len(v), length)):
        a = float(scale[0, n])
        turned = [start + (i - SPAN // 2) % length for i in range(SPAN)]
        seam = best(v[turned, n], np.diag(gram)[turned], a, None, None)[SPAN // 2 - 1] & OVERLAP
        for here in range(start, start + length, BLOCKS.block):
            first = min(here, start + length - SPAN)
            mine, later = np.arange(here, first + SPAN), np.arange(first + SPAN, len(v))
            rest = np.arange(here, len(v))
            errors = v[:here, n] - a * VALUES[states[:here, n]]
            ideal = v[rest, n] + np.linalg.solve(gram[np.ix_(rest, rest)], gram[rest, :here] @ errors)
            left = gram[np.ix_(mine, mine)]
            if len(later):
                across = gram[np.ix_(mine, later)]
                left = left - across @ np.linalg.solve(gram[np.ix_(later, later)], across.T)
            before = seam if here == start else states[here - 1, n] & OVERLAP
            after = seam if first + SPAN == start + length else None
            states[mine, n] = best(ideal[: len(mine)], np.diag(left), a, before, after)
    return states


@pytest.mark.parametrize("length", [12, 6])
def test_blocks_are_least_squares_re_solved(length):
    v, gram, scale = posed()
    root = np.linalg.cholesky(gram.astype(np.float64)[::-1, ::-1])[::-1, ::-1].T
    got = in_blocks(jnp.asarray(v), jnp.asarray(root, jnp.float32), of(v, scale, length), BLOCKS)
    states = literal(v, gram, scale, length)
    np.testing.assert_array_equal(got.steps, states & 1)
    np.testing.assert_allclose(got.dense(), scale * VALUES[states], rtol=1e-6)


@pytest.mark.parametrize("length", [12, 4])
def test_descent_tries_each_window(length):
    v, gram, scale = posed(seed=1)
    steps = np.random.default_rng(2).integers(0, 2, v.shape).astype(np.uint8)
    form = of(v, scale, length, steps)
    got = descend(jnp.asarray(v), jnp.asarray(gram), form, BLOCKS, jnp.int32(1))
    span = min(SPAN, length)
    step = -(-span // 2)
    wide, a = v.astype(np.float64), gram.astype(np.float64)
    for n in range(v.shape[1]):
        states = np.concatenate(
            [walked(int("".join(map(str, part[-2:])), 2), part) for part in steps[:, n].reshape(-1, length)]
        )
        size = float(scale[0, n])

        def total(states, n=n, size=size):
            e = wide[:, n] - size * VALUES[states]
            return e @ a @ e

        for start in range(0, len(v), length):
            for number in range(-(-length // step)):
                place = number * step + step // 2 + 1
                mine = [start + (place + i) % length for i in range(span)]
                rest = np.setdiff1d(np.arange(len(v)), mine)
                e = wide[rest, n] - size * VALUES[states[rest]]
                square = a[np.ix_(mine, mine)]
                z = wide[mine, n] + np.linalg.solve(square, a[np.ix_(mine, rest)] @ e)
                ends = states[start + (place - 1) % length] & OVERLAP, states[mine[-1]] & OVERLAP
                new = states.copy()
                new[mine] = best(z, np.diag(square), size, *ends)
                states = new if total(new) < total(states) else states
        np.testing.assert_array_equal(got.steps[:, n], states & 1)


def test_no_sweep_raises_the_sum_and_all_beat_the_nearest():
    w, x, y = (jnp.asarray(a) for a in problem(200, 48, 8))
    statistics = finish(gather(y, x, difference=True))
    form = lcq.Trellis(2, memory=6, per="channel").project(w)
    errors = []
    for sweeps in (0, 2):
        method = BlockLDL(sweeps=sweeps)
        prepared = jax.jit(method.prepare)(w, statistics)
        got = method.codes(w, statistics, form)
        e = np.asarray(prepared.recursion.target, np.float64) - np.asarray(got.dense())
        errors.append((e * (np.asarray(prepared.gram, np.float64) @ e)).sum(0))
    assert (errors[1] <= errors[0] * (1 + 1e-4)).all() and errors[1].sum() < 0.95 * errors[0].sum()
    direct = path_error(*map(np.asarray, (w, x, y)), form).sum()
    assert path_error(*map(np.asarray, (w, x, y)), got).sum() < 0.7 * direct


def test_methods_that_stand_for_others():
    assert Descent().on_paths() == Qronos().on_paths() == BlockLDL()
    assert GPTQ(damping=0.1).on_paths() == BlockLDL(damping=0.1, follows=False)
    assert Descent(GPTQ(), shrink=0.0).on_paths() == BlockLDL(follows=False, shrink=0.0)
    for method, said in ((GPFQ(), "one weight after another"), (GPTQ(act_order=True), "act_order=False")):
        with pytest.raises(ValueError, match=said):
            method.on_paths()
    with pytest.raises(ValueError, match="sweeps= a whole number, at least 0"):
        BlockLDL(sweeps=-1)


def test_a_codebook_is_rounded_as_by_gptq():
    w, x, _ = problem(60, 20, 4)
    form = lcq.Uniform(3, per="channel").project(jnp.asarray(w))
    statistics = finish(gather(jnp.asarray(x)))
    expected = GPTQ().codes(jnp.asarray(w), statistics, form)
    np.testing.assert_array_equal(BlockLDL().codes(jnp.asarray(w), statistics, form).codes, expected.codes)


@pytest.mark.parametrize("per", [None, 6])
def test_dead_inputs_and_groups(per):
    """Mapped over groups, of which one has no data."""
    w, x, y = (np.stack(a) for a in zip(*(problem(50, 12, 3, seed=g) for g in range(2)), strict=True))
    x[0, :, 3] = y[0, :, 3] = x[1] = y[1] = 0
    scheme = lcq.Trellis(BITS, memory=MEMORY, per=per)

    def run(w, x, y):
        statistics = finish(gather(y, x, difference=True))
        got = BlockLDL(block=3, ahead=2, sweeps=1).codes(w, statistics, scheme.project(w))
        return got, base.residual(w, statistics, got)

    got, errors = jax.jit(jax.vmap(run))(*map(jnp.asarray, (w, x, y)))
    assert np.isfinite(errors).all() and (np.asarray(errors)[1] == 0).all()
    dense = np.asarray(jax.vmap(lambda form: form.dense())(got))
    assert np.isfinite(dense).all() and ((dense[1] - w[1]) ** 2).sum() < 0.8 * (w[1] ** 2).sum()
    np.testing.assert_allclose(errors[0], path_error(w[0], x[0], y[0], jax.tree.map(lambda a: a[0], got)), rtol=1e-3)
