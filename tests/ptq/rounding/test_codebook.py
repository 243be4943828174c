"""Levels of a form: scaled, and of a negative scale."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import lcq
from lcq.ptq.rounding.codebook import choose, draw, scaled
from tests.ptq.rounding.oracles import SCHEMES, n, problem


def test_scaled():
    w = jnp.asarray(problem()[0])
    each = jnp.linspace(0.5, 2, n)
    for name in ("grid", "grid of one group for all", "zero points in groups", "learned", "long grid"):
        form = SCHEMES[name].project(w)
        if form.zero is not None and name == "zero points in groups":
            form = dataclasses.replace(form, scale=form.scale[:, :1], zero=form.zero[:, :1])
        for factor in (0.5, jnp.float32(2.0), each):
            got = scaled(form, factor)
            kept = None if form.scale is None else (form.scale * factor).astype(form.scale.dtype)  # bfloat16 in groups
            wanted = (
                form.dense() * factor if kept is None else dataclasses.replace(form, scale=kept, zero=got.zero).dense()
            )
            np.testing.assert_allclose(got.dense(), wanted, rtol=1e-6)
            got.pack().check_stored()
    learned = dataclasses.replace(SCHEMES["learned"].project(w), scale=jnp.ones((1, n)))
    np.testing.assert_allclose(scaled(learned, each).dense(), learned.dense() * each, rtol=1e-6)
    with pytest.raises(ValueError, match="fixed table"):
        scaled(SCHEMES["frozen"].project(w), 2.0)


def test_a_negative_scale_turns_levels_round():
    """Every choice on a form with a negative scale is that on the mirrored table."""
    rng = np.random.default_rng(3)
    z, u = rng.normal(size=(200, 3)).astype(np.float32), rng.random((200, 3)).astype(np.float32)
    for values in ((-2.0, -1.0, 0.0, 1.0), (-1.0, 0.25, 2.0), tuple(map(float, range(-20, 30)))):
        scale = np.array([[0.5, -0.5, -0.25]], np.float32)
        form = lcq.Levels(values, scale=True, per="channel").project(jnp.asarray(z))
        form = dataclasses.replace(form, scale=jnp.asarray(scale))
        table = scale[..., None] * np.asarray(values)
        away = np.abs(z[..., None].astype(np.float64) - table)
        got = np.asarray(choose(jnp.asarray(z), form))
        np.testing.assert_allclose(np.take_along_axis(away, got[..., None], -1)[..., 0], away.min(-1), atol=1e-6)
        drawn = np.asarray(draw(jnp.asarray(z), form, jnp.asarray(u))).astype(int)
        ascending = np.sort(table, -1)
        inside = np.clip(z, ascending[..., 0], ascending[..., -1])
        value = np.take_along_axis(np.broadcast_to(table, (*z.shape, len(values))), drawn[..., None], -1)[..., 0]
        low = np.where(ascending <= inside[..., None], ascending, -np.inf).max(-1)
        high = np.where(ascending >= inside[..., None], ascending, np.inf).min(-1)
        assert (np.isclose(value, low) | np.isclose(value, high)).all()
        values_of = [
            np.take_along_axis(
                np.broadcast_to(table, (*z.shape, len(values))),
                np.asarray(draw(jnp.asarray(z), form, jnp.full(z.shape, (i + 0.5) / 400)))[..., None].astype(int),
                -1,
            )[..., 0]
            for i in range(400)
        ]
        np.testing.assert_allclose(np.mean(values_of, 0), inside, atol=0.01 * np.abs(table).max())
