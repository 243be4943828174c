"""Dense definitions of the entropy of blocks in float64: every block's K^n memberships, one by one."""

import itertools

import jax.numpy as jnp
import numpy as np


def members(w, centres):
    """P_w of one weight, by going through the intervals."""
    p = np.zeros(len(centres))
    for b in range(1, len(centres)):
        if centres[b - 1] <= w < centres[b]:
            p[b] = (w - centres[b - 1]) / (centres[b] - centres[b - 1])
            p[b - 1] = 1 - p[b]
    if w >= centres[-1]:
        p[-1] = 1
    if w < centres[0]:
        p[0] = 1
    return p


def histogram(w, centres, order):
    """The sum over blocks, an array of K^n, and how many blocks there are."""
    flat = np.asarray(w, np.float64).ravel()
    many = len(flat) // order
    total = np.zeros((len(centres),) * order)
    for block in flat[: many * order].reshape(many, order):
        total += np.einsum(*itertools.chain(*((members(x, centres), [i]) for i, x in enumerate(block))), range(order))
    return total, many


def bits(total, many):
    p = total[total > 0] / many
    return -(p * np.log2(p)).sum() / total.ndim


def dense_entropy(pairs, order):
    """Pooled over pairs of leaves and centres; ranks count from the lowest."""
    size = max(len(c) for _, c in pairs)
    whole, all_blocks = np.zeros((size,) * order), 0
    for w, c in pairs:
        total, many = histogram(w, c, order)
        whole[tuple(slice(n) for n in total.shape)] += total
        all_blocks += many
    return bits(whole, all_blocks)


def differentiable_entropy(w, centres, order):
    """The same for one leaf, for autodiff: memberships as hats over the centres."""
    c = jnp.concatenate([centres[:1] - 1, centres, centres[-1:] + 1])
    x = w.reshape(-1)[: w.size // order * order, None]
    rising, falling = (x - c[:-2]) / (c[1:-1] - c[:-2]), (c[2:] - x) / (c[2:] - c[1:-1])
    hats = jnp.maximum(0, jnp.where(x < c[1:-1], rising, falling)).reshape(-1, order, len(centres))
    blocks = hats[:, 0]
    for i in range(1, order):
        blocks = (blocks[:, :, None] * hats[:, i, None, :]).reshape(len(blocks), -1)
    p = blocks.mean(0)
    return -jnp.sum(jnp.where(p > 0, p * jnp.log2(jnp.where(p > 0, p, 1)), 0)) / order


def closed_form(w, c):
    """dH_2/dw, weight by weight, from the formula."""
    total, many = histogram(w, c, 2)
    p, slopes = total / many, np.zeros(2 * many)
    with np.errstate(divide="ignore", invalid="ignore"):
        for i, pair in enumerate(w.ravel()[: 2 * many].reshape(many, 2)):
            for place, (mine, other) in enumerate((pair, pair[::-1])):
                b = int(np.searchsorted(c, mine, side="right"))
                here = p if place == 0 else p.T
                ratios = np.where(members(other, c) > 0, np.log2(here[b - 1] / here[b]), 0)
                slopes[2 * i + place] = (members(other, c) * ratios).sum() / (2 * many * (c[b] - c[b - 1]))
    return slopes
