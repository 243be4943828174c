"""Forms of random codes, and their weights in float64: nothing has to be compressed, or compiled."""

import jax.numpy as jnp
import numpy as np

from lcq.forms import Codes


def grid(low, high):
    return tuple(map(float, range(low, high + 1)))


PRODUCTS = [
    (grid(-8, 7), 16, False),
    (grid(-8, 7), None, False),
    (grid(-128, 127), None, False),
    (grid(0, 7), 16, True),
    (grid(0, 3), 16, True),
    (grid(0, 15), None, True),
    (grid(0, 31), 16, True),
    (grid(0, 255), 16, True),
    (grid(-2, 1), 16, False),
    (grid(-16, 15), None, False),
    ((-1.0, 1.0), None, False),
]
"""Values, inputs of a group, and whether there are zeros: what a product of ONNX has to compute."""


def codes(shape, blocks, values, *, zeros=False, scale="bfloat16", seed=0):
    """A form in the working layout, in numpy, with so many blocks along the axes, and its weights."""
    rng = np.random.default_rng(seed)
    k = len(values)
    numbers = None if scale is None else rng.normal(size=blocks).astype(jnp.dtype(scale)) / np.asarray(64, scale)
    zero = rng.integers(0, k, blocks).astype(np.uint8) if zeros else None
    form = Codes(rng.integers(0, k, shape).astype(np.uint8 if k <= 256 else np.uint16), None, numbers, zero, values)
    return form, weights(form)


def weights(form):
    """scale (table[codes] - zero), each block's number repeated."""
    made = np.asarray(form.values, np.float64)[form.codes]
    for number, change in ((form.zero, np.subtract), (form.scale, np.multiply)):
        if number is not None:
            spread = np.asarray(number).astype(np.float64)
            for axis, n in enumerate(form.codes.shape):
                spread = np.repeat(spread, n // spread.shape[axis], axis)
            made = change(made, spread)
    return made
