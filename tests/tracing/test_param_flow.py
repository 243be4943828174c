"""What parameters are followed to, and where they cannot be. That products compute what the function does, see
tests/ptq/test_two_stream.py."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import lcq
from lcq.tracing.param_flow import trace

X = jax.ShapeDtypeStruct((5, 4), jnp.float32)


def shapes(**kwargs):
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in kwargs.items()}


# Products


def test_products_of_a_trace():
    """Their order, kind and (G, M, N, n), and which are the first to use their weights."""

    def fn(p, x):
        image = (x @ p["w"]).reshape(1, 5, 6, 1)
        kernel = p["k"].astype(jnp.bfloat16).astype(jnp.float32)
        y = lax.conv_general_dilated(image, kernel, (1, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return y.sum() + jnp.einsum("bi,ei->eb", x @ p["w"] @ p["w"].T, p["e"][:, 1])

    params = shapes(w=(4, 6), k=(2, 2, 1, 3), e=(7, 2, 4))
    with pytest.raises(ValueError, match=r"e: .* got 28 of 56 weights in products"):
        trace(fn, params, X, ["e"])
    program = trace(fn, params, X, ["w", "k"])
    found = [(p.path, p.kind, p.shape, p.flops, p.number in program.first) for p in program.products]
    assert found == [
        ("w", "dot", (1, 5, 4, 6), 240, True),
        ("k", "conv", (1, 12, 4, 3), 288, True),
        ("w", "dot", (1, 5, 4, 6), 240, False),
        ("w", "dot", (1, 5, 6, 4), 240, False),
    ]
    chains = [p.weight.chain() for p in program.products]
    assert chains[1:] == ["k -> convert_element_type -> convert_element_type", "w", "w -> transpose"]
    assert all("test_param_flow.py:" in p.source for p in program.products)


def test_elements_of_slices_and_stacks():
    def fn(p, x):
        def step(x, w):
            return x @ w.T[:, ::-1], None

        left, right = jnp.split(p["w"], [3], axis=1)
        return lax.scan(step, x, p["s"], reverse=True)[0], (x @ left).sum() + (x @ right).sum()

    program = trace(fn, shapes(w=(4, 5), s=(3, 4, 4)), X, ["w", "s"])
    leaves = {"w": np.arange(20).reshape(4, 5), "s": np.arange(48).reshape(3, 4, 4)}
    got = [(p.path, p.weight.index, p.weight.elements(leaves[p.path].shape)) for p in program.products]
    wanted = [("s", (i,), leaves["s"][i].T[:, ::-1]) for i in (2, 1, 0)]
    wanted += [("w", (), leaves["w"][:, :3]), ("w", (), leaves["w"][:, 3:])]
    for (path, index, places), (path_wanted, index_wanted, places_wanted) in zip(got, wanted, strict=True):
        assert (path, index) == (path_wanted, index_wanted)
        np.testing.assert_array_equal(places, places_wanted)


def test_elements_of_a_stack_of_stacks():
    def step(x, w):
        return x @ w, None

    def fn(p, x):
        return lax.scan(lambda x, inner: lax.scan(step, x, inner), x, p["w"])[0]

    products = trace(fn, shapes(w=(2, 3, 4, 4)), X, ["w"]).products
    assert [p.weight.index for p in products] == [(i, j) for i in range(2) for j in range(3)]
    places = np.stack([p.weight.elements((2, 3, 4, 4)) for p in products])
    np.testing.assert_array_equal(places, np.arange(96).reshape(6, 4, 4))


def test_pieces_of_a_concatenation():
    """A product for each of them, named after the line of the whole one; the rest is computed as it stands."""

    def fn(p, x):
        whole = jnp.concatenate([p["a"], p["b"], p["c"], jnp.ones((4, 1))], 1)
        return x @ whole.astype(jnp.bfloat16).astype(jnp.float32)

    program = trace(fn, shapes(a=(4, 3), b=(4, 2), c=(4, 5)), X, ["a", "c"])
    assert [(p.path, p.shape) for p in program.products] == [("a", (1, 5, 4, 3)), ("c", (1, 5, 4, 5))]
    lines = [re.search(r"test_param_flow\.py:(\d+)", p.source)[1] for p in program.products]
    assert lines[0] == lines[1]
    assert program.bias_sites == {}


# Shifts

NORM = np.float32(2)

SHIFTS = {  # fn of the result x @ w [5, 6] and a vector; expected: sign, or None
    "added": (lambda y, b: y + b, 1),
    "added to": (lambda y, b: b + y, 1),
    "subtracted": (lambda y, b: (y - b) * NORM, -1),
    "subtracted from": (lambda y, b: b - y, None),
    "after a change of layout": (lambda y, b: y.T.reshape(2, 3, 5) + b.reshape(2, 3, 1), 1),
    "after a cast": (lambda y, b: y.astype(jnp.bfloat16) + b.astype(jnp.bfloat16), 1),
    "after a function": (lambda y, b: jnp.tanh(y) + b, None),
    "of a slice": (lambda y, b: y[:, :3] + b[:3], None),
    "one for all": (lambda y, b: y + b[0], None),
    "one for each row": (lambda y, b: y + b[:5, None], None),
    "a function of it": (lambda y, b: y + jnp.exp(b), None),
    "only the first": (lambda y, b: y + b + b[::-1], None),
    "result used twice": (lambda y, b: (y + b) * y, None),
    "result moved and used twice": (lambda y, b: (y.T + b[:, None]).sum() + y.sum(), None),
    "result returned": (lambda y, b: (y + b, y), None),
    "used elsewhere": (lambda y, b: (y + b).sum() + b.sum(), None),
    "returned": (lambda y, b: (y + b, b), None),
    "another part used elsewhere": (lambda y, b: (y + b[:6]).sum() + b[6:].sum(), 1),
    "in a scan that is not entered": (lambda y, b: lax.scan(lambda y, _: (y + b, None), y, None, 2)[0], None),
}


@pytest.mark.parametrize("case", SHIFTS)
def test_shifts(case):
    use, sign = SHIFTS[case]
    size = 8 if "part" in case else 6
    program = trace(lambda p, x: use(x @ p["w"], p["b"]), shapes(w=(4, 6), b=(size,)), X, ["w"])
    assert {number: shift.sign for number, shift in program.bias_sites.items()} == ({} if sign is None else {0: sign})
    for shift in program.bias_sites.values():
        (part,) = shift.parts
        assert part.path == "b"
        np.testing.assert_array_equal(part.neurons, np.arange(6))
        np.testing.assert_array_equal(part.elements, np.arange(6))


def test_no_shift_for_a_bias_of_two_layers():
    def fn(p, x):
        return jnp.tanh(x @ p["w"] + p["b"]) @ p["v"] + p["b"]

    assert trace(fn, shapes(w=(4, 4), v=(4, 4), b=(4,)), X, ["w", "v"]).bias_sites == {}


def joined(p, *names):
    return jnp.concatenate([p[name] for name in names], -1)


JOINED = {  # fn of q, k [4, 3], w [4, 6], b, c [3] and d [6]; by kernel the biases, and the first place in each
    "both": (lambda p, x: x @ joined(p, "q", "k") + joined(p, "b", "c"), {"q": {"b": 0}, "k": {"c": 0}}),
    "kernels": (lambda p, x: x @ joined(p, "q", "k") + p["d"], {"q": {"d": 0}, "k": {"d": 3}}),
    "biases": (lambda p, x: x @ p["w"] + joined(p, "b", "c"), {"w": {"b": 0, "c": 0}}),
    "other lengths": (lambda p, x: x @ joined(p, "q", "k") - joined(p, "a", "b", "e"), {"k": {"b": 1, "e": 0}}),
    "apart again": (
        lambda p, x: [y + p[b] for y, b in zip(jnp.split(x @ joined(p, "q", "k"), 2, 1), "bc", strict=True)],
        {"q": {"b": 0}, "k": {"c": 0}},
    ),
    "neither": (
        lambda p, x: jnp.concatenate([x @ p["q"] + p["b"], x @ p["k"] + p["c"]], 1),
        {"q": {"b": 0}, "k": {"c": 0}},
    ),
    "stacked": (
        lambda p, x: jnp.einsum("bi,sio->bso", x, jnp.stack([p["q"], p["k"]])) + jnp.stack([p["b"], p["c"]]),
        {"q": {"b": 0}, "k": {"c": 0}},
    ),
    "with numbers": (lambda p, x: x @ p["w"] + jnp.concatenate([p["b"], jnp.ones(3)]), {}),
    "returned too": (lambda p, x: (x @ joined(p, "q", "k") + joined(p, "b", "c"), p["b"]), {"k": {"c": 0}}),
    "result used twice": (lambda p, x: (y := x @ joined(p, "q", "k")) * (y + joined(p, "b", "c")), {}),
    "one part used twice": (
        lambda p, x: ((y := x @ joined(p, "q", "k")) + joined(p, "b", "c"), jnp.tanh(y[:, :3])),
        {"k": {"c": 0}},
    ),
    "turned": (lambda p, x: (x @ joined(p, "q", "k")).T + joined(p, "c", "b")[:, None], {"q": {"c": 0}, "k": {"b": 0}}),
    "twice the same": (lambda p, x: x @ joined(p, "q", "k") + joined(p, "b", "b"), {}),
    "for rows": (lambda p, x: x @ joined(p, "q", "k") + joined(p, "b", "e")[:, None], {}),
}


@pytest.mark.parametrize("name", JOINED)
def test_biases_of_concatenated_kernels(name):
    """Kernels or biases or both are joined; what is used elsewhere, or not for all neurons of a kernel, is no bias."""
    fn, expected = JOINED[name]
    params = shapes(q=(4, 3), k=(4, 3), w=(4, 6), a=(2,), b=(3,), c=(3,), d=(6,), e=(2 if name == "for rows" else 1,))
    program = trace(fn, params, X, ["w"] if "w" in expected or name == "with numbers" else ["q", "k"])
    found = {
        program.products[number].path: {part.path: int(part.elements[0]) for part in site.parts}
        for number, site in program.bias_sites.items()
    }
    if name == "other lengths":  # [a a b | b b e]
        expected = {"q": {"a": 0, "b": 0}, "k": {"b": 1, "e": 0}}
    assert found == expected
    for site in program.bias_sites.values():
        assert site.sign == (-1 if name == "other lengths" else 1)


def test_first_of_two_biases_and_one_that_is_followed():
    """A mean is subtracted after the bias: the bias takes the shift. A leaf in a product is no bias."""

    def fn(p, x):
        return x @ p["w"] + p["b"] - p["mean"] + p["u"] @ jnp.ones((4, 6))

    params = shapes(w=(4, 6), b=(6,), mean=(6,), u=(4,))
    assert [part.path for site in trace(fn, params, X, ["w", "u"]).bias_sites.values() for part in site.parts] == ["b"]


def test_numbers_that_are_no_arrays():
    program = trace(
        lambda p, x: x @ p["w"] * p["scale"] + p["add"], {**shapes(w=(4, 6)), "scale": 2.0, "add": 1}, X, "w"
    )
    assert program.bias_sites == {} and len(program.products) == 1


# Errors


def convolve(x, w, **settings):
    return lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), **settings)


W = {"w": (4, 6)}

ERRORS = {  # fn, shapes, the way and the equation, the remedy
    "scaled": (lambda p, x: x @ (p["w"] * p["s"]), W | {"s": (6,)}, "w -> mul", "fold this into the parameter before"),
    "cast and scaled": (
        lambda p, x: x @ (p["w"].astype(jnp.bfloat16) * 2).astype(jnp.float32),
        W,
        "w -> convert_element_type -> mul",
        "fold this into the parameter before",
    ),
    "concatenated and scaled": (
        lambda p, x: x @ (2 * jnp.concatenate([p["w"], p["v"]], 1)),
        W | {"v": (4, 2)},
        "w -> concatenate -> mul",
        "fold",
    ),
    "concatenated, in a cond": (
        lambda p, x: lax.cond(x[0, 0] > 0, lambda w: x @ w, lambda w: x @ w + 1, jnp.concatenate([p["w"], p["v"]], 1)),
        W | {"v": (4, 2)},
        "w -> concatenate -> cond",
        "without control flow",
    ),
    "concatenated and returned": (
        lambda p, x: jnp.concatenate([p["w"], p["v"]], 1),
        W | {"v": (4, 2)},
        "w -> concatenate as an output",
        "exclude it",
    ),
    "concatenated along the window": (
        lambda p, x: convolve(x.reshape(1, 5, 4), jnp.concatenate([p["w"], p["v"]], 0)),
        {"w": (2, 4, 6), "v": (1, 4, 6)},
        "w -> concatenate -> conv_general_dilated",
        "fold",
    ),
    "pieces left out": (
        lambda p, x: x @ jnp.concatenate([p["w"], p["v"]], 1)[:, 1:],
        W | {"v": (4, 2)},
        "got 20 of 24 weights in products",
        "exclude it",
    ),
    "copied": (
        lambda p, x: jnp.einsum("bi,bio->bo", x, jnp.broadcast_to(p["w"], (5, 4, 6))),
        W,
        "w -> broadcast_in_dim",
        "fold",
    ),
    "looked up": (lambda p, x: p["w"][x.argmax(1)], W, "w -> gather", "rounded to nearest"),
    "tied": (
        lambda p, x: p["w"].T[x.argmax(1)] @ p["w"],
        {"w": (4, 4)},
        "w -> transpose -> gather",
        "rounded to nearest",
    ),
    "in a cond": (
        lambda p, x: lax.cond(x[0, 0] > 0, lambda: x @ p["w"], lambda: x @ p["w"] + 1),
        W,
        "w -> cond",
        "without control flow",
    ),
    "in a while": (
        lambda p, x: lax.while_loop(lambda x: x.sum() > 0, lambda x: x @ p["w"] - 1, x),
        {"w": (4, 4)},
        "w -> while",
        "write it as a lax.scan",
    ),
    "in parts of a mesh, in a cond": (
        lambda p, x: jax.shard_map(
            lambda w, x: lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x @ w + 1),
            mesh=jax.make_mesh((1,), ("d",)),
            in_specs=(P(), P()),
            out_specs=P(),
        )(p["w"], x),
        W,
        "w -> shard_map",
        "without control flow",
    ),
    "returned": (lambda p, x: (x @ p["w"], p["w"].T), W, "w -> transpose as an output", "exclude it"),
    "given out by a scan": (
        lambda p, x: lax.scan(lambda x, w: (x @ w, w.T), x, p["w"]),
        {"w": (3, 4, 4)},
        r"w\[0\] -> transpose -> scan",
        "exclude it",
    ),
    "two parameters": (
        lambda p, x: x @ (p["w"] @ p["v"]),
        W | {"v": (6, 4)},
        "w -> dot_general",
        "fold the two before",
    ),
    "a learned start": (
        lambda p, x: x + p["start"] @ p["w"],
        {"w": (4, 4), "start": (1, 4)},
        "w -> dot_general",
        "fold",
    ),
    "outer product": (
        lambda p, x: jnp.tensordot(x, p["w"], 0),
        W,
        "w -> dot_general|w -> broadcast_in_dim|w -> reshape",
        "fold",
    ),
    "kernel as the image": (
        lambda p, x: convolve(p["w"], x.reshape(1, 4, 5)),
        {"w": (2, 6, 4)},
        "w -> conv_general_dilated",
        "exclude it",
    ),
    "groups of the batch": (
        lambda p, x: convolve(x.reshape(4, 5, 1), p["w"], batch_group_count=2),
        {"w": (3, 1, 6)},
        "w -> conv_general_dilated",
        "exclude it",
    ),
    "overlapping slices": (
        lambda p, x: (x @ p["w"][:, :4]).sum() + (x @ p["w"][:, 3:]).sum(),
        W,
        "w -> slice -> dot_general at .* with 4 of 12 used before",
        "exclude it",
    ),
    "partly used": (lambda p, x: x @ p["w"][:, 1:], W, "got 20 of 24 weights in products", "exclude it"),
    "unused": (lambda p, x: x, W, "got 0 of 24 weights in products .is it closed over", "pass it through params"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_leaf_the_equation_and_the_remedy(case):
    fn, sizes, way, remedy = ERRORS[case]
    with pytest.raises(ValueError, match=f"^w: expected .*({way})") as error:
        trace(fn, shapes(**sizes), X, ["w"])
    message = str(error.value)
    assert remedy in message
    assert "->" not in message or "as an output" in message or re.search(r"test_param_flow\.py:\d+", message), message
    trace(fn, shapes(**sizes), X, [])


@pytest.mark.parametrize("case", ERRORS)
def test_what_an_error_advises_helps(case):
    """Both remedies as the message spells them: in `rtn=`, and left out before the rule."""
    fn, sizes, *_ = ERRORS[case]
    r = np.random.default_rng(0)
    params = {name: jnp.asarray(r.normal(size=shape), jnp.float32) for name, shape in sizes.items()}
    batch, scheme = jnp.asarray(-abs(r.normal(size=X.shape)), jnp.float32), lcq.Uniform(4)
    rules = [lcq.Rule("w", scheme)]
    with pytest.raises(ValueError) as error:
        lcq.quantize(fn, params, [batch], rules)
    spelt = {"lcq": lcq, "scheme": scheme}
    rtn = eval(re.search(r"quantize\(\.\.\., rtn=(\[.*?\])\)", str(error.value))[1], spelt)
    none = eval(re.search(r"exclude it with (lcq\.Rule\(.*?\)) before", str(error.value))[1], spelt)
    done = lcq.quantize(fn, params, [batch], [], rtn=rtn)
    plain = lcq.compress(params, rules)["w"]
    np.testing.assert_array_equal(done.forms["w"].dense(), plain.dense())
    assert lcq.quantize(fn, params, [batch], [none, *rules[1:]]).forms["w"] is params["w"]


def test_remedies_of_paths_that_are_no_patterns():
    """What stands in a path may mean something else in a pattern."""
    params, batch = {"a.b+[0]": jnp.ones((4, 6)), "v": jnp.ones((6, 2))}, jnp.ones(X.shape)
    scheme = lcq.Uniform(4)

    def fn(p, x):
        return x @ jnp.exp(p["a.b+[0]"]) @ p["v"]

    with pytest.raises(ValueError, match=r"^a\.b\+\[0\]: expected .* exp") as error:
        lcq.quantize(fn, params, [batch], [lcq.Rule(".*", scheme)])
    none = eval(re.search(r"exclude it with (lcq\.Rule\(.*?, None\))", str(error.value))[1], {"lcq": lcq})
    done = lcq.quantize(fn, params, [batch], [none, lcq.Rule(".*", scheme)])
    assert [record.path for record in done.records] == ["v"]


REWRITTEN = {  # what else an error advises, done
    "scaled": lambda p, x: x @ p["w"],
    "in a cond": lambda p, x: x @ p["w"] + jnp.where(x[0, 0] > 0, 0, 1),
    "in a while": lambda p, x: lax.scan(lambda x, _: (x @ p["w"] - 1, None), x, None, 3)[0],
    "two parameters": lambda p, x: x @ p["w"],
    "unused": lambda p, x: x @ p["w"],
}


@pytest.mark.parametrize("case", REWRITTEN)
def test_what_an_error_advises_for_the_function_helps(case):
    _, sizes, *_ = ERRORS[case]
    assert trace(REWRITTEN[case], shapes(**sizes), X, ["w"]).products[0].path == "w"
