"""Products of signs by XNOR and popcount, in XLA for any backend; made for CPUs with a vector popcount.

sum_k s_k t_k = K - 2 popcount(a xor b)
"""

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Int32, UInt32

from lcq.forms.meshes import varied

_TILES = (256, 128, 64)
"""Columns side by side in a tile. 64 are four registers of 512 bits, or eight of 256."""

_CACHED = 1 << 13
"""Words of a tile, 32 kB, that stay in a core's first cache from row to row."""

_UNROLLED = 128
"""Words of one fusion, 4,096 signs: of twice as many XLA makes scalar code."""


def tile(b: UInt32[Array, "n w"]) -> UInt32[Array, "t w c"]:
    """Weights as `xnor` reads them, made once when they are loaded; the last tile is filled with zeros.

    Wide tiles are fewer to go through, if they stay in the cache and are not filled with more than narrow ones.
    """
    n, words = b.shape
    *wide, least = _TILES
    fit = [c for c in wide if c * words <= _CACHED and -n % c == -n % least]
    columns = fit[0] if fit else least
    return jnp.pad(b, ((0, -n % columns), (0, 0))).reshape(-1, columns, words).swapaxes(1, 2)


def xnor(a: UInt32[Array, "m w"], tiles: UInt32[Array, "t w c"], size: int) -> Int32[Array, "m n"]:
    """y[m, n] = sum_k s_k t_k = size - 2 popcount(a[m] xor b[n]), for all columns of the tiles, t c.

    Bits behind the last sign must be equal in both, as zeros are.

    Args:
        a: signs of the activations, bit j of word i is sign 32 i + j.
        tiles: signs of the weights, see `tile`.
        size: how many signs there are, at most 32 w.

    The words are unrolled inside of a fusion, so that a tile's sums stay in registers. The constraint on the layout
    of the result keeps the tile's columns innermost: without it XLA turns the loops round, and it is slower by 5 to 30.
    """
    whole = a.shape[1] // _UNROLLED * _UNROLLED
    counts = varied(jnp.zeros((tiles.shape[0], a.shape[0], tiles.shape[2]), jnp.int32), a)
    if whole > _UNROLLED:
        chunks = a[:, :whole].reshape(a.shape[0], -1, _UNROLLED).swapaxes(0, 1)
        weights = tiles[:, :whole].reshape(tiles.shape[0], -1, _UNROLLED, tiles.shape[2]).swapaxes(0, 1)
        counts = jax.lax.scan(lambda sums, part: (sums + _differing(*part), None), counts, (chunks, weights))[0]
    else:
        whole = 0
    counts = with_layout_constraint(size - 2 * (counts + _differing(a[:, whole:], tiles[:, whole:])), Layout((0, 1, 2)))
    return counts.swapaxes(0, 1).reshape(a.shape[0], -1)


def _differing(a: UInt32[Array, "m w"], tiles: UInt32[Array, "t w c"]) -> Int32[Array, "t m c"]:
    """How many bits differ, of words few enough to unroll."""
    counts = jnp.zeros((tiles.shape[0], a.shape[0], tiles.shape[2]), jnp.int32)
    for i in range(a.shape[1]):
        counts += jax.lax.population_count(a[None, :, i, None] ^ tiles[:, None, i]).astype(jnp.int32)
    return counts
