"""Paths through a trellis that are chosen in blocks of inputs: with feedback between blocks, then again and again.

What rounding v to q adds is e'Ae, e = v - q, with A = H + delta I = F'F and F lower triangular. Of blocks I of inputs,
one after another, that is the sum of `in_blocks`,

    e'Ae = sum_I ||F_II (z_I - q_I)||^2,    z_I = v_I + F_II^{-1} sum_{s < I} F_Is e_s

exactly, however the inputs are cut: z_I is what the errors before it ask for, F_II'F_II what is left of A when all
inputs after I are free to follow (its Schur complement). With all others as they are, as `descend` has them, it is

    e'Ae = (z_I - q_I)' A_II (z_I - q_I) + constant,    z_I = q_I + A_II^{-1} (A e)_I

A trellis adds up one term for each weight, so of the matrix M of a block, F_II'F_II or A_II, it sees the diagonal:

    (z_I - q_I)' M (z_I - q_I)    counts as    sum_{t in I} M_tt (z_t - q_t)^2

That is all that is approximate, and nothing where inputs of a block are not correlated; the path with the least sum is
found exactly. `descend` looks at the block's exact sum, and keeps the path that it has unless the new one has less.

Where paths meet: a block begins in the state that the one before it ended in. A path that ends with its block takes
what suits its last weights, and the next one pays; so it is looked for `ahead` inputs further, and only its first
`block` inputs are kept. A piece bites its tail: its first block begins with the overlap that a free path has there, and
windows that reach its end have to end with that.

Source: block LDL, Tseng et al., QuIP#, arXiv 2402.04396, and QTIP, arXiv 2406.11235, which end paths with their blocks
and leave out the diagonal; looking ahead, and descent on blocks: lcq's.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt16

from lcq.forms import Trellis
from lcq.forms.state_values import table_of
from lcq.ptq.rounding.sequential import dot
from lcq.ptq.statistics import column_sums
from lcq.schemes.trellis.viterbi import best_paths, overlap_of, tail_biting

_triangular = jax.scipy.linalg.solve_triangular


class Blocks(NamedTuple):
    """How many inputs are decided at a time, and how many more are looked at."""

    block: int
    ahead: int

    def window(self, form: Trellis) -> int:
        """Inputs of a window: those of a state at least, those of a piece at most."""
        return min(max(sum(self), -(-form.memory // form.width)), form.length)


def in_blocks(target: Float[Array, "N n"], root: Float[Array, "N N"], form: Trellis, blocks: Blocks) -> Trellis:
    """The form with codes that are chosen in blocks, each with regard to the errors before it.

    Args:
        target: v.
        root: F, what is above its diagonal is zero.
        form: of weights [N, n], paths down its columns, in the working layout: its scales are kept, its codes do not
            count.
        blocks: how the inputs are cut.
    """
    size, bits, piece, dtype = len(target), form.width, form.length, target.dtype
    span, steps = blocks.window(form), -(-piece // blocks.block)
    table, scale = jnp.asarray(table_of(form.memory, form.code), dtype), scale_of_rows(form, dtype)
    seams = _seams(target, scale, column_sums(root * root), form, span)

    def rows(a: Array, first: Array, axis: int = 0) -> Array:
        return jax.lax.dynamic_slice_in_dim(a, first, span, axis)

    def window(number: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        """Decides the inputs from `here` up to the end of its window, those beyond the block for the time being."""
        states, errors = carry
        start, step = number // steps * piece, number % steps
        here = start + step * blocks.block
        first = jnp.minimum(here, start + piece - span)
        mine = (jnp.arange(span) >= here - first)[:, None]
        across, before = rows(root, first), jnp.where(jnp.arange(size)[:, None] < here, errors, 0)
        square = jnp.where(mine & mine.T, rows(across, first, 1), jnp.eye(span, dtype=dtype))
        z = rows(target, first) + _triangular(square, dot(across, before), lower=True)
        points = _weighted(z, rows(scale, first), jnp.where(mine, jnp.sqrt(column_sums(square * square))[:, None], 0))
        seam = seams[number // steps]
        begin = jnp.where(step == 0, seam, _overlap(states[jnp.maximum(here - 1, 0)], form))
        ends = jnp.stack([begin, jnp.where(first == start + piece - span, seam, -1)])
        found = jnp.where(mine, best_paths(*points, table, ends, bits, here - first), rows(states, first))
        new = rows(target, first) - rows(scale, first) * table[found]
        states = jax.lax.dynamic_update_slice_in_dim(states, found, first, 0)
        return states, jax.lax.dynamic_update_slice_in_dim(errors, new, first, 0)

    nothing = jnp.zeros(target.shape, jnp.uint16), jnp.zeros_like(target)
    return _with_states(form, jax.lax.fori_loop(0, size // piece * steps, window, nothing)[0])


def descend(
    target: Float[Array, "N n"], gram: Float[Array, "N N"], form: Trellis, blocks: Blocks, turn: Int[Array, ""]
) -> Trellis:
    """The form with codes for which e'Ae is no larger, in half-overlapping windows that go round each piece.

    Args:
        target: v.
        gram: A.
        form: of weights [N, n], as in `in_blocks`, with codes.
        blocks: say how long windows are.
        turn: of how many; windows begin at other inputs each time.
    """
    size, bits, piece, dtype = len(target), form.width, form.length, target.dtype
    span = blocks.window(form)
    step = -(-span // 2)
    steps = -(-piece // step)
    table, scale = jnp.asarray(table_of(form.memory, form.code), dtype), scale_of_rows(form, dtype)
    states = _rows_of(form.states(), form)

    def window(number: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        states, errors = carry
        start = number // steps * piece
        place = (number % steps) * step + turn * (step // 2 + 1)
        mine = start + (place + jnp.arange(span)) % piece
        across, e, a = gram[mine], errors[mine], scale[mine]
        square, pull = across[:, mine], dot(across, errors)
        z = target[mine] - e + jnp.linalg.solve(square, pull)
        begin = _overlap(states[start + (place - 1) % piece], form)
        ends = jnp.stack([begin, _overlap(states[mine[-1]], form)])
        points = _weighted(z, a, jnp.sqrt(jnp.diagonal(square))[:, None])
        found = best_paths(*points, table, ends, bits)
        moved = target[mine] - a * table[found] - e
        better = column_sums(moved * (dot(square, moved) + 2 * pull)) < 0
        states = states.at[mine].set(jnp.where(better, found, states[mine]))
        return states, errors.at[mine].add(jnp.where(better, moved, 0))

    carry = states, target - scale * table[states]
    return _with_states(form, jax.lax.fori_loop(0, size // piece * steps, window, carry)[0])


def nearest_paths(w: Float[Array, "N n"], form: Trellis) -> Trellis:
    """The form with codes for which each path misses its own weights least."""
    table, scale = jnp.asarray(table_of(form.memory, form.code), w.dtype), scale_of_rows(form, w.dtype)
    points = _weighted(_pieces(w, form), _pieces(scale, form), jnp.ones((form.length, 1), w.dtype))
    return _with_states(form, _rows_of(tail_biting(*points, table, form.width), form))


def scale_of_rows(form: Trellis, dtype: DTypeLike) -> Float[Array, "N n"]:
    """The scale of every weight."""
    scale = jnp.asarray(form.scale).astype(dtype)
    spread = jnp.broadcast_to(scale, (scale.shape[0], form.shape[1]))
    return jnp.repeat(spread, form.shape[0] // scale.shape[0], 0)


def _seams(target: Array, scale: Array, weights: Array, form: Trellis, span: int) -> Int[Array, "p n"]:
    """The overlap with which each piece begins and ends: of a free path across its end and its beginning."""
    half, table = span // 2, jnp.asarray(table_of(form.memory, form.code), target.dtype)
    near = (jnp.arange(span) - half) % form.length
    each = [_pieces(a, form)[near] for a in (target, scale, jnp.sqrt(weights)[:, None] * jnp.ones_like(target))]
    found = best_paths(*_weighted(*each), table, None, form.width)
    return overlap_of(found[: half or 1], table, form.width).reshape(-1, target.shape[1])


def _weighted(
    z: Float[Array, "t p"], scale: Float[Array, "t p"], root: Float[Array, "t #p"]
) -> tuple[Float[Array, "t p"], Float[Array, "t p"]]:
    """Numbers and scales times the roots of their weights, in units of each column, whose squares neither overflow nor
    vanish."""
    root = root / _or_one(root.max())
    unit = _or_one(jnp.maximum(jnp.abs(root * z).max(0), jnp.abs(root * scale).max(0)))
    return root * z / unit, root * scale / unit


def _or_one(a: Array) -> Array:
    return jnp.where(a > 0, a, 1)


def _pieces(a: Array, form: Trellis) -> Array:
    """Rows [N, n] as pieces side by side [t, p], by piece and then by neuron."""
    return a.reshape(-1, form.length, a.shape[1]).swapaxes(0, 1).reshape(form.length, -1)


def _rows_of(pieces: Array, form: Trellis) -> Array:
    """Inverse of `_pieces`."""
    return pieces.reshape(form.length, -1, form.shape[1]).swapaxes(0, 1).reshape(form.shape)


def _overlap(states: Array, form: Trellis) -> Array:
    return states.astype(jnp.int32) & ((1 << form.memory - form.width) - 1)


def _with_states(form: Trellis, states: UInt16[Array, "N n"]) -> Trellis:
    """The form with the codes of states, which are their last bits."""
    return dataclasses.replace(form, steps=states.astype(jnp.uint8) & ((1 << form.width) - 1))
