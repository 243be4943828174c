"""Nets that are large: a layer of a stack at a time, whatever it is read from, and one set of sums for equal inputs."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lcq
from lcq.forms import Codes
from lcq.ptq import gathering
from lcq.ptq.leaf_assembly import Assembly
from lcq.ptq.pieces import cut
from lcq.ptq.schedule import schedule
from lcq.tracing.param_flow import trace
from tests.ptq.small_net import bare, draw

LAYERS, WIDTH, HIDDEN, WORDS = 3, 16, 24, 20
KERNELS = {
    "wq": (WIDTH, WIDTH),
    "wk": (WIDTH, WIDTH // 2),
    "wv": (WIDTH, WIDTH // 2),
    "wo": (WIDTH, WIDTH),
    "gate": (WIDTH, HIDDEN),
    "up": (WIDTH, HIDDEN),
    "down": (HIDDEN, WIDTH),
}
RULES = [lcq.Rule("embedding|norm", None), lcq.Rule(".*", lcq.Uniform(4, per=8))]
METHOD = bare("qronos")


def decoder(p, tokens):
    """A scan over blocks of attention, with half as many heads of keys and values, and a gated layer."""
    x = p["embedding"][tokens]

    def layer(x, w):
        y = x * w["norm"]
        q, k, v = ((y @ w[name]).reshape(*y.shape[:2], -1, 4) for name in ("wq", "wk", "wv"))
        k, v = (jnp.repeat(a, 2, 2) for a in (k, v))
        a = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k))
        x = x + jnp.einsum("bhts,bshd->bthd", a, v).reshape(y.shape) @ w["wo"]
        return x + (jax.nn.silu(x @ w["gate"]) * (x @ w["up"])) @ w["down"], None

    return lax.scan(layer, x, {name: p[name] for name in (*KERNELS, "norm")})[0]


def params():
    made = {name: draw(LAYERS, *shape, seed=i) / 6 for i, (name, shape) in enumerate(KERNELS.items())}
    return made | {"embedding": draw(WORDS, WIDTH), "norm": np.ones((LAYERS, WIDTH), np.float32)}


TOKENS = [np.random.default_rng(i).integers(WORDS, size=(5, 8)) for i in range(2)]


class Read:
    """A leaf that notes how many elements each reading takes."""

    def __init__(self, array):
        self.array, self.shape, self.dtype, self.taken = array, array.shape, array.dtype, []

    @property
    def size(self):
        return self.array.size

    @property
    def ndim(self):
        return self.array.ndim

    def __getitem__(self, index):
        found = self.array[index]
        self.taken.append(found.size)
        return found


def same(one, two):
    for a, b in zip(jax.tree.leaves(one.forms), jax.tree.leaves(two.forms), strict=True):
        np.testing.assert_array_equal(a, b)


def test_leaves_are_read_a_layer_at_a_time():
    given = params()
    lazy = {name: Read(a) for name, a in given.items()}
    done = lcq.quantize(decoder, lazy, TOKENS, RULES, METHOD)
    same(done, lcq.quantize(decoder, given, TOKENS, RULES, METHOD))
    assert not any(isinstance(leaf, Read) for leaf in done.forms.values())
    for name, shape in KERNELS.items():
        checked, *taken = lazy[name].taken
        assert checked == lazy[name].size and set(taken) == {shape[0] * shape[1]}, (
            name
        )  # the check is in parts if large


def test_checkpoints_on_disk(tmp_path):
    given = {name: np.asarray(jnp.asarray(a, jnp.bfloat16)) for name, a in params().items()}
    lcq.io.write(tmp_path / "net.safetensors", given)
    lazy = lcq.io.read(tmp_path, lazy=True)
    same(*(lcq.quantize(decoder, tree, TOKENS, RULES, METHOD) for tree in (given, lazy)))


def test_lazy_leaves_that_are_not_finite_are_named():
    given = params()
    given["wo"][2, 1, 1] = np.nan
    with pytest.raises(ValueError, match="wo: expected finite weights, got 1 NaN or infinite of 768"):
        lcq.quantize(decoder, {name: Read(a) for name, a in given.items()}, TOKENS, RULES, METHOD)


def test_equal_inputs_share_one_set_of_sums(monkeypatch):
    """Queries, keys and values; gate and up. The same codes as each with sums of its own."""
    calls, plain = [], gathering.folded

    def counted(uses, w, moments):
        calls.extend([uses] * moments)
        return plain(uses, w, moments)

    monkeypatch.setattr(gathering, "folded", counted)
    one = lcq.quantize(decoder, params(), TOKENS, RULES, METHOD)
    assert len(calls) == 4 * LAYERS
    monkeypatch.setattr(gathering, "_have_same_inputs", lambda one, two: False)
    two = lcq.quantize(decoder, params(), TOKENS, RULES, METHOD)
    assert len(calls) == (4 + 7) * LAYERS
    same(one, two)


def test_shared_sums_are_those_of_the_inputs():
    """In float64 numpy; masks of equal numbers share too, and other arrays of equal numbers do not."""

    def fn(p, batch):
        x, other = batch
        return (x @ p["a"]).sum() + (x @ p["b"]).sum() + (other @ p["c"]).sum()

    given = {"a": draw(4, 3), "b": draw(4, 5), "c": draw(4, 2)}
    x = draw(12, 4)
    seen, plain = [], gathering.folded

    def kept(uses, w, moments):
        sums = plain(uses, w, moments)
        seen.extend([jax.tree.map(np.array, sums.moments)] * moments)
        return sums

    try:
        gathering.folded = kept
        rule = [lcq.Rule(".", lcq.Uniform(4))]
        lcq.quantize(fn, given, [(x, x + 0)], rule, METHOD, mask=lambda batch: np.arange(12) < 9)
    finally:
        gathering.folded = plain
    assert len(seen) == 2
    for moments in seen:
        rows = x[:9].astype(np.float64)
        y = (moments.sum_y + moments.count[..., None] * moments.shift).sum((0, 1))
        np.testing.assert_allclose(y, rows.sum(0), atol=1e-5)
        count, shift = (np.asarray(a, np.float64)[0] for a in (moments.count, moments.shift))
        mean = np.asarray(moments.sum_y, np.float64)[0]
        cross = mean[:, :, None] * shift[:, None]
        gram = np.asarray(moments.gram[0], np.float64) + cross + cross.swapaxes(1, 2)
        gram += count[:, None, None] * shift[:, :, None] * shift[:, None]
        np.testing.assert_allclose(gram.sum(0), rows.T @ rows, atol=1e-4)


def stack(p, x):
    return lax.scan(lambda x, w: (x @ w, None), x, p["w"])[0]


def peak_of_puts(layers, width=48):
    """Bytes at the most, beyond what is held before, while the layers of a stack are put together."""
    leaf = np.zeros((layers, width, width), np.float32)
    products = trace(stack, {"w": leaf}, jnp.zeros((5, width)), ["w"]).products
    codes = jnp.asarray(np.random.default_rng(0).integers(3, size=(1, width, width)), jnp.uint8)
    form = Codes(codes, scale=jnp.ones((1, 1, width)), values=(-1.0, 0.0, 2.0))
    assembly = Assembly(leaf)
    assembly.put(products[0], form)
    tracemalloc.start()
    for product in products[1:]:
        assembly.put(product, form)
        assembly.forget(product)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert assembly.form().dense().shape == leaf.shape
    return most / leaf.size


def test_putting_a_layer_together_takes_memory_for_that_layer():
    """Not for the stack, of which only codes are held, which the first put has taken: bytes a weight of the stack."""
    few, many = peak_of_puts(8), peak_of_puts(64)
    assert many < 2.5 and many < few / 2, (few, many)


def bytes_of_pieces(tokens):
    """What the largest piece of the walk needs beside its inputs, for a batch."""
    program = trace(decoder, params(), tokens, KERNELS)
    _, pieces = cut(program, 0, schedule([program]))
    needed = []
    for piece in pieces.values():
        shapes = [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in piece.ins]
        found = piece.function.lower(*shapes).compile().memory_analysis()
        needed.append(found.temp_size_in_bytes + found.output_size_in_bytes)
    return max(needed)


def test_smaller_batches_need_less_memory_and_give_the_same_sums():
    """Up to rounding, which may move a code that is a tie."""
    whole = np.concatenate(TOKENS)[:8]
    parts = [whole[i : i + 2] for i in range(0, 8, 2)]
    assert bytes_of_pieces(parts[0]) < 0.3 * bytes_of_pieces(whole)
    one, two = (lcq.quantize(decoder, params(), batches, RULES, METHOD) for batches in ([whole], parts))
    for name in KERNELS:
        assert (one.forms[name].codes == two.forms[name].codes).mean() > 0.99, name
