"""Training and frozen forms against loops over explicit signs, in whole numbers and float64."""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lcq
from lcq.forms.column_words import pack_signs
from lcq.layers import binary, frozen

RNG = np.random.default_rng(0)
ULP = 2.0**-23


class Case(NamedTuple):
    size: tuple
    spatial: tuple
    channels: int
    outputs: int
    batch: tuple = (2,)
    strides: int | tuple = 1
    padding: str | tuple = "SAME"
    dilation: int | tuple = 1
    pad_value: int = 0


CONVOLUTIONS = [
    Case((1, 1), (5, 4), 33, 3, strides=2),
    Case((3, 3), (5, 6), 32, 4),
    Case((3, 3), (5, 6), 40, 65, batch=(), strides=2),
    Case((2, 3), (6, 5), 3, 4, strides=2, padding="VALID", batch=(2, 3)),
    Case((3, 3), (5, 5), 5, 4, pad_value=1),
    Case((2, 3), (4, 5), 70, 4, strides=(1, 2)),
    Case((2, 3), (4, 7), 5, 4, dilation=(2, 3), pad_value=1),
    Case((3, 2), (4, 5), 5, 4, padding=((2, 0), (0, 3)), strides=(2, 1)),
    Case((4,), (3,), 5, 4),
    Case((3, 1, 2), (3, 2, 3), 5, 4, strides=(1, 2, 1)),
]
DENSE = [((), 1, 1), ((3,), 31, 5), ((2, 3), 70, 65), ((9,), 64, 3)]


def numbers(shape, spread=1.0):
    """Normal, some of them zeros of either sign."""
    x = RNG.normal(size=shape).astype(np.float32) * spread
    x[RNG.random(shape) < 0.1] = 0.0
    x[RNG.random(shape) < 0.1] = -0.0
    return jnp.asarray(x)


def signs_of(x):
    return np.where(np.asarray(x, np.float64) >= 0, 1, -1).astype(np.int64)


def alpha_of(w):
    w = np.abs(np.asarray(w, np.float64))
    return w.sum(tuple(range(w.ndim - 1))) / (w.size // w.shape[-1])


def padded(s, case):
    """The signs [batch, *spatial, c] with their surroundings, and the slices where they are."""
    each = lambda n: n if isinstance(n, tuple) else (n,) * len(case.size)  # noqa: E731
    strides, dilation = each(case.strides), each(case.dilation)
    span = [1 + (k - 1) * d for k, d in zip(case.size, dilation, strict=True)]
    margins = case.padding
    if margins == "VALID":
        margins = [(0, 0)] * len(span)
    if margins == "SAME":
        missing = [max((-(-n // t) - 1) * t + k - n, 0) for n, t, k in zip(case.spatial, strides, span, strict=True)]
        margins = [(m // 2, m - m // 2) for m in missing]
    whole = np.full((len(s), *(a + n + b for (a, b), n in zip(margins, case.spatial, strict=True)), s.shape[-1]), 0)
    whole[:] = case.pad_value
    image = (slice(None), *(slice(a, a + n) for (a, _), n in zip(margins, case.spatial, strict=True)))
    whole[image] = s
    extents = zip(whole.shape[1:-1], span, strides, strict=True)
    return whole, image, strides, dilation, tuple((n - k) // t + 1 for n, k, t in extents)


def steps(case, strides, dilation, places):
    """(place, tap, pixel) of all products of a convolution."""
    for place, tap in itertools.product(np.ndindex(*places), np.ndindex(*case.size)):
        at = (p * t + k * d for p, t, k, d in zip(place, strides, tap, dilation, strict=True))
        yield (slice(None), *place), tap, (slice(None), *at)


def convolve(s, t, case):
    whole, _, strides, dilation, places = padded(s, case)
    y = np.zeros((len(s), *places, t.shape[-1]), np.int64)
    for place, tap, pixel in steps(case, strides, dilation, places):
        y[place] += whole[pixel] @ t[tap]
    return y


def setting(case):
    return binary.window(
        case.size, strides=case.strides, padding=case.padding, dilation=case.dilation, pad_value=case.pad_value
    )


def conv_parts(case):
    x = numbers((*case.batch, *case.spatial, case.channels))
    return x, numbers((*case.size, case.channels, case.outputs), 0.5), numbers(case.outputs)


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_convolutions_are_the_definition(case):
    x, w, b = conv_parts(case)
    window = setting(case)
    images = signs_of(x).reshape(-1, *case.spatial, case.channels)
    sums = convolve(images, signs_of(w), case)
    sums = sums.reshape(*case.batch, *sums.shape[1:])

    @jax.jit
    def both(x, w, b):
        layer = frozen.freeze(w, b, window=window)
        return binary.conv(x, w, b, window=window), frozen.apply(layer, x), frozen.product(layer, pack_signs(x))

    y, packed, whole = both(x, w, b)
    assert (y.dtype, packed.dtype, whole.dtype) == (jnp.float32, jnp.float32, jnp.int32)
    np.testing.assert_array_equal(whole, sums)
    largest = np.abs(alpha_of(w) * sums).max()
    np.testing.assert_allclose(y, alpha_of(w) * sums + np.asarray(b, np.float64), rtol=4 * ULP, atol=4 * ULP * largest)
    np.testing.assert_allclose(packed, y, rtol=5e-7, atol=ULP * largest)


@pytest.mark.parametrize(("batch", "inputs", "outputs"), DENSE)
def test_dense_layers_are_the_definition(batch, inputs, outputs):
    x, w = numbers((*batch, inputs)), numbers((inputs, outputs))
    sums = signs_of(x) @ signs_of(w)

    @jax.jit
    def all_of_it(x, w):
        scaled, plain = frozen.freeze(w), frozen.freeze(w, scale=False)
        trained = binary.dense(x, w), binary.dense(x, w, scale=False)
        return trained, (frozen.apply(scaled, x), frozen.apply(plain, x)), frozen.product(scaled, pack_signs(x))

    (y, bare), packed, whole = all_of_it(x, w)
    np.testing.assert_array_equal(whole, sums)
    np.testing.assert_array_equal(bare, sums)
    np.testing.assert_allclose(y, sums * alpha_of(w), rtol=4 * ULP)
    np.testing.assert_array_equal(packed[0], y)
    np.testing.assert_array_equal(packed[1], bare)


@pytest.mark.parametrize(("dtype", "last"), [(jnp.bfloat16, 2.0**-7), (jnp.float16, 2.0**-10)])
def test_shorter_floats_are_summed_exactly_and_rounded_once(dtype, last):
    case = CONVOLUTIONS[2]
    parts = [jnp.asarray(a, dtype) for a in conv_parts(case)]
    x, w, b = (np.asarray(a, np.float64) for a in parts)
    sums = convolve(signs_of(x)[None], signs_of(w), case)[0]
    wanted = alpha_of(w) * sums + b
    window = setting(case)
    packed = jax.jit(lambda x, w, b: frozen.apply(frozen.freeze(w, b, window=window), x))
    for y in (jax.jit(functools.partial(binary.conv, window=window))(*parts), packed(*parts)):
        assert y.dtype == dtype
        np.testing.assert_allclose(np.asarray(y, np.float64), wanted, rtol=0.51 * last, atol=1e-5)


@pytest.mark.parametrize("platform", ["xla", "gpu", "tpu"])
def test_every_platform_holds_the_same_bits(platform):
    w = numbers((2, 2, 5, 3))
    layer = frozen.freeze(w, window=binary.window((2, 2)), platform=platform)
    words = np.asarray(layer.weights.words)
    columns = words[0].T if platform == "xla" else words.T  # [n, words], a word for each pixel
    bits = (columns[:3, :4, None] >> np.arange(32, dtype=np.uint32)) & 1
    np.testing.assert_array_equal(bits[..., :5], np.moveaxis(signs_of(w), -1, 0).reshape(3, 4, 5) > 0)
    assert not bits[..., 5:].any()


def test_the_sign_is_the_packed_one_and_its_gradient_is_clipped():
    x = jnp.array([-np.inf, -2, -1, -0.5, -0.0, 0, 1e-45, 1, 1.0001, np.nan], jnp.float32)
    value, pull = jax.vjp(binary.sign, x)
    np.testing.assert_array_equal(value, [-1, -1, -1, -1, 1, 1, 1, 1, 1, -1])
    np.testing.assert_array_equal(pull(3 * jnp.ones(10))[0], [0, 0, 3, 3, 3, 3, 3, 3, 0, 0])
    np.testing.assert_array_equal(pack_signs(x), pack_signs(value))
    assert binary.sign(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def weight_gradient(g, w, scale):
    """dL/dW of g = dL/dV, with V = alpha sign(W)."""
    w = np.asarray(w, np.float64)
    near = np.abs(w) <= 1
    return g * (1 / (w.size // w.shape[-1]) + alpha_of(w) * near) if scale else g * near


@pytest.mark.parametrize("scale", [True, False])
def test_gradients_of_dense_layers_are_the_papers(scale):
    x, w, b, g = numbers((6, 9)), numbers((9, 4)), numbers(4), numbers((6, 4))
    _, pull = jax.vjp(jax.jit(functools.partial(binary.dense, scale=scale)), x, w, b)
    to_x, to_w, to_b = pull(g)
    x, w, g = (np.asarray(a, np.float64) for a in (x, w, g))
    v = signs_of(w) * (alpha_of(w) if scale else 1.0)
    assert (np.abs(w) > 1).any() and (np.abs(x) > 1).any()
    np.testing.assert_allclose(to_x, (g @ v.T) * (np.abs(x) <= 1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(to_w, weight_gradient(signs_of(x).T @ g, w, scale), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(to_b, g.sum(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", [CONVOLUTIONS[1], CONVOLUTIONS[6]], ids=str)
def test_gradients_of_convolutions_are_the_papers(case):
    x, w, b = conv_parts(case)
    w = 2 * w
    y, pull = jax.vjp(jax.jit(functools.partial(binary.conv, window=setting(case))), x, w, b)
    g = RNG.normal(size=y.shape)
    to_x, to_w, to_b = pull(jnp.asarray(g, jnp.float32))
    whole, image, strides, dilation, places = padded(signs_of(x), case)
    v, around, kernel = signs_of(w) * alpha_of(w), np.zeros(whole.shape), np.zeros(w.shape)
    for place, tap, pixel in steps(case, strides, dilation, places):
        around[pixel] += g[place] @ v[tap].T
        kernel[tap] += whole[pixel].T @ g[place]
    np.testing.assert_allclose(to_x, around[image] * (np.abs(x) <= 1), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(to_w, weight_gradient(kernel, w, True), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(to_b, g.sum((0, 1, 2)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("c", [0.1, 1 / 3, 7e-5])
def test_weights_of_one_size_have_it_as_alpha(c):
    w = np.where(RNG.random((301, 5)) < 0.5, np.float32(c), -np.float32(c))
    assert (np.asarray(jax.jit(binary.binarize)(jnp.asarray(w)).alpha) == np.float32(c)).all()


@pytest.mark.parametrize("per", [None, "channel"])
def test_weights_of_lcq_are_their_own_binarization(per):
    form = lcq.Binary(scale=True, per=per).project(numbers((3, 3, 7, 6)))
    weights = jax.jit(binary.binarize)(form.dense())
    np.testing.assert_array_equal(weights.signs * weights.alpha, form.dense())


def test_weights_of_zero_neither_break_nor_move():
    w = jnp.zeros((4, 2)).at[:, 1].set(0.5)
    y, pull = jax.vjp(jax.jit(lambda w: binary.dense(jnp.ones(4), w)), w)
    np.testing.assert_array_equal(y, [0, 2])
    np.testing.assert_array_equal(pull(jnp.ones(2))[0], [[0, 0.75]] * 4)


def test_mapped_over_a_batch_and_over_layers():
    case = CONVOLUTIONS[4]
    x, w, b = conv_parts(case)
    window, kernels = setting(case), jnp.stack([w, -w])

    @jax.jit
    def mapped(x, kernels, b):
        layers = jax.vmap(lambda w: frozen.freeze(w, b, window=window))(kernels)
        packed = jax.vmap(jax.vmap(frozen.apply, (None, 0)), (0, None))(layers, x)
        one = functools.partial(binary.conv, bias=b, window=window)
        return packed, jax.vmap(jax.vmap(one, (0, None)), (None, 0))(x, kernels)

    images = signs_of(x).reshape(-1, *case.spatial, case.channels)
    for packed, trained, kernel in zip(*mapped(x, kernels, b), kernels, strict=True):
        y = alpha_of(kernel) * convolve(images, signs_of(kernel), case) + np.asarray(b, np.float64)
        np.testing.assert_allclose(packed, y, rtol=5e-7, atol=1e-6)
        np.testing.assert_allclose(trained, y, rtol=5e-7, atol=1e-6)


KERNEL, WINDOW = jnp.ones((3, 3, 4, 2)), binary.window((3, 3), padding="VALID")


@functools.cache
def packed():
    return jax.jit(functools.partial(frozen.freeze, window=WINDOW))(KERNEL)


ERRORS = [
    (lambda: binary.dense(jnp.ones((2, 5)), jnp.ones((4, 3))), r"x \[.., 4\].*got float32\[2, 5\]"),
    (lambda: binary.dense(jnp.ones((2, 4)), jnp.ones((4, 3)), jnp.ones(2)), r"bias \[3\].*got \[2\]"),
    (lambda: binary.conv(jnp.ones((5, 4)), KERNEL, window=WINDOW), "2 spatial axes, 4"),
    (lambda: binary.conv(jnp.ones((2, 5, 2, 4)), KERNEL, window=WINDOW), "window of .3, 3. fits into, got .5, 2."),
    (lambda: binary.conv(jnp.ones((5, 5, 4)), KERNEL[0], window=WINDOW), r"kernel \[3, 3, 'c', 'n'\], got \[3, 4, 2\]"),
    (lambda: frozen.freeze(KERNEL), "or a window"),
    (lambda: frozen.freeze(KERNEL[0], window=WINDOW), r"kernel \[3, 3, 'c', 'n'\], got \[3, 4, 2\]"),
    (lambda: frozen.apply(packed(), jnp.ones((5, 5, 3))), "got float32.5, 5, 3."),
    (lambda: frozen.apply(packed(), jnp.ones((2, 5, 4))), "fits into, got .2, 5."),
    (lambda: frozen.product(packed(), jnp.ones((5, 2), jnp.uint32)), "words of 4 channels"),
    (lambda: binary.window((3, 3), strides=(1, 1, 1)), "strides: expected 2 whole numbers"),
    (lambda: binary.window((3, 0)), "kernel_size"),
    (lambda: binary.window(()), "kernel_size"),
    (lambda: binary.window((3, 3), dilation=0), "dilation"),
    (lambda: binary.window((3, 3), padding="same"), "padding: expected 'SAME'"),
    (lambda: binary.window((3, 3), padding=[(1, 1)]), "2 pairs"),
    (lambda: binary.window((3, 3), padding=1), "2 pairs.*got 1"),
    (lambda: binary.window((3, 3), padding=[1, 1]), "got .1, 1."),
    (lambda: binary.window((3,), padding=[(-1, 1)]), "1 pairs of numbers from 0"),
    (lambda: binary.window((3,), pad_value=2), "pad_value: expected 0 or 1, got 2"),
]


@pytest.mark.parametrize(("call", "message"), ERRORS, ids=[message for _, message in ERRORS])
def test_errors_say_what_was_wanted(call, message):
    with pytest.raises(ValueError, match=message):
        call()
