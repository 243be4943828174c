"""Small arrays to prune, and oracles in float64 numpy: all subsets of groups, and the conditions of the l1 ball."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

MU = 2.0
SHAPE = (4, 2)


def problems(n=24, shape=SHAPE, seed=0):
    """Arrays with ties and zeros, and weights over many magnitudes."""
    rng = np.random.default_rng(seed)
    x = rng.standard_t(3, size=(n, *shape)).astype(np.float32)
    x[: n // 4] = rng.integers(-3, 4, (n // 4, *shape))
    return x, rng.lognormal(sigma=2, size=x.shape).astype(np.float32)


def groups(scheme):
    """The group of every weight of `SHAPE`."""
    rows, columns = np.indices(SHAPE)
    places = {None: 2 * rows + columns, "channel": columns, 2: 2 * (rows // 2) + columns, (2, 0): rows // 2}
    return places[scheme.group].ravel()


def all_masks(scheme):
    """Every mask of `SHAPE`, and the number of groups that it touches."""
    masks = np.array(list(itertools.product([False, True], repeat=8)))
    return masks, np.stack([masks[:, groups(scheme) == g].any(1) for g in np.unique(groups(scheme))], 1).sum(1)


def check_best_of(masks, price, scheme, weighted):
    """That a scheme keeps weights as they are, by the mask whose sum h (x - Theta)^2 + price is the least."""
    x, h = problems()
    importance = {"importance": jnp.asarray(h)} if weighted else {}
    forms = jax.vmap(lambda x, w: scheme.project(x, mu=MU, **w))(jnp.asarray(x), importance)
    h = (h if weighted else np.ones_like(h)).reshape(-1, 8).astype(np.float64)
    wide, dense, mask = (np.asarray(a).reshape(-1, 8) for a in (x.astype(float), forms.dense(), forms.mask))
    best = ((h * wide**2)[:, None] * ~masks).sum(-1) + price
    np.testing.assert_array_equal(dense, np.where(mask, x.reshape(-1, 8), 0))
    for i in range(len(x)):
        assert (masks == mask[i]).all(1).any()
        paid = price[(masks == mask[i]).all(1)].item()
        assert (h[i] * (wide[i] - dense[i]) ** 2).sum() + paid == pytest.approx(best[i].min(), rel=1e-6)
    return mask


def ball(norms, left, radius, h=1.0):
    """Theta is the projection on sum |theta| <= radius iff h (|x| - |theta|) = tau >= 0 where theta is not zero and at
    most tau elsewhere, and tau = 0 or the sum is the radius. Returns tau."""
    norms, left, h = (np.asarray(abs(a), np.float64) for a in (norms, left, h * np.ones_like(norms)))
    fall = h * (norms - left)
    tau = fall[left > 0].max(initial=0.0) if left.any() else fall.max()
    near = 1e-5 * (h * norms).max()
    np.testing.assert_allclose(fall[left > 0], tau, rtol=1e-5, atol=near)
    assert (fall[left == 0] <= tau + near).all() and (left >= 0).all()
    assert left.sum() <= radius * (1 + 1e-5)
    assert tau <= near or left.sum() == pytest.approx(radius, rel=1e-5)
    return tau


DEGENERATE = [np.ones(6), np.zeros(6), np.array([3.0]), np.array(-0.25), [1e38, -1e38, 0], [2e-38, 0, -3e-38]]


def degenerate(scheme, x):
    """x and its dense projection in float64, and the form; what holds of every scheme is checked."""
    x = np.asarray(x, np.float32)
    form = scheme.project(jnp.asarray(x), mu=MU)
    dense = np.asarray(form.dense(), np.float64)
    assert form.shape == x.shape and np.isfinite(dense).all() and not dense[~np.asarray(form.mask)].any()
    np.testing.assert_array_equal(form.pack().dense(), form.dense())
    return x.astype(np.float64), dense, form
