"""Windows of images against loops over pixels; matrices of kernels and outputs against einsum on plain layouts."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from lcq.tracing.im2col import flatten_axes, kernel_matrix, output_matrix, patches


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_flatten_axes():
    a = draw(2, 3, 4, 5)
    got = flatten_axes(jnp.asarray(a), (1,), (3, 0), (), (2,))
    np.testing.assert_array_equal(got, np.einsum("abcd->bdac", a).reshape(3, 10, 1, 4))


def window_at(image, place, window, strides, padding, lhs_dilation, rhs_dilation):
    """What the window sees there of one image [*spatial, c]: pixels of the dilated image, zeros around and between."""
    seen = np.zeros((*window, image.shape[-1]), image.dtype)
    for offset in itertools.product(*map(range, window)):
        at = [
            p * s + o * r - low
            for p, s, o, r, (low, _) in zip(place, strides, offset, rhs_dilation, padding, strict=True)
        ]
        inside = all(a % d == 0 and 0 <= a // d < n for a, d, n in zip(at, lhs_dilation, image.shape, strict=False))
        if inside:
            seen[offset] = image[tuple(a // d for a, d in zip(at, lhs_dilation, strict=True))]
    return seen


PLAIN = {"strides": (1, 1), "padding": [(0, 0), (0, 0)], "lhs_dilation": (1, 1), "rhs_dilation": (1, 1)}

CASES = {
    "plain": {},
    "strides": {"strides": (2, 3)},
    "strides that leave a rest": {"strides": (3, 2), "padding": [(0, 1), (1, 0)]},
    "unequal padding": {"padding": [(2, 1), (0, 3)]},
    "negative padding": {"padding": [(-1, 2), (1, -2)]},
    "dilated kernel": {"rhs_dilation": (2, 3), "padding": [(1, 1), (2, 2)]},
    "dilated image": {"lhs_dilation": (2, 3), "padding": [(1, 2), (-1, 0)]},
    "all at once, groups": {"strides": (2, 1), "padding": [(1, 2), (2, 0)], "lhs_dilation": (2, 1), "groups": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_patches(case):
    settings = {**PLAIN, **CASES[case]}
    groups = settings.pop("groups", 1)
    window, images = (3, 2), draw(2, 6, 7, 4)
    got = patches(jnp.asarray(images), (0, 3, 1, 2), window=window, **settings, groups=groups)
    sizes = [
        ((n - 1) * d + 1 + sum(pad) - (k - 1) * r - 1) // s + 1
        for n, k, s, pad, d, r in zip((6, 7), window, *settings.values(), strict=True)
    ]
    rows = [
        window_at(image, place, window, **settings)
        for image in images
        for place in itertools.product(*map(range, sizes))
    ]
    wanted = np.stack(rows).reshape(len(rows), 6, groups, 4 // groups).transpose(2, 0, 1, 3)
    np.testing.assert_array_equal(got, wanted.reshape(groups, len(rows), -1))


def test_patches_in_any_layout_and_dtype():
    """One spatial axis, the batch last, bfloat16 exactly."""
    x = draw(3, 5, 2)  # batch, place, channel
    settings = {"window": (2,), "strides": (1,), "padding": [(1, 0)], "lhs_dilation": (1,), "rhs_dilation": (1,)}
    plain = patches(jnp.asarray(x), (0, 2, 1), **settings)
    short = patches(jnp.asarray(x.transpose(1, 2, 0), jnp.bfloat16), (2, 1, 0), **settings)
    assert short.dtype == jnp.bfloat16
    np.testing.assert_array_equal(short, plain.astype(jnp.bfloat16))


@pytest.mark.parametrize("groups", [1, 3])
def test_kernel_and_outputs(groups):
    """OIHW and HWIO agree; each group has its own block of outputs, inputs being window first, then channels."""
    kernel, images = draw(6, 2, 3, 5), draw(2, 6, 4, 3)  # OIHW, NCHW
    matrix = kernel_matrix(jnp.asarray(kernel), (0, 1, 2, 3), groups)
    wanted = kernel.reshape(groups, 6 // groups, 2, 3, 5).transpose(0, 3, 4, 2, 1).reshape(groups, 30, -1)
    np.testing.assert_array_equal(matrix, wanted)
    np.testing.assert_array_equal(
        kernel_matrix(jnp.asarray(kernel.transpose(2, 3, 1, 0)), (3, 2, 0, 1), groups), wanted
    )
    rows = output_matrix(jnp.asarray(images), (0, 1, 2, 3), groups)
    wanted = images.transpose(0, 2, 3, 1).reshape(24, groups, -1).swapaxes(0, 1)
    np.testing.assert_array_equal(rows, wanted)
