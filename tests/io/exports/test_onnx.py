"""ONNX: a dense model written out by hand, its weights replaced, and the result run here node by node in numpy."""

import numpy as np
import pytest

from lcq.io import Name, export
from lcq.io.layouts.protobuf import field, fields
from tests.io.exports.made import PRODUCTS, codes, grid

RNG = np.random.default_rng(0)
B, C = (RNG.normal(size=shape).astype(np.float32) for shape in ((48, 32), (32, 20)))
BIAS = RNG.normal(size=32).astype(np.float32)


TYPES = {"float32": 1, "float16": 10, "float64": 11}


def tensor(name, array, *more):
    said = b"".join(field(1, n) for n in array.shape) + field(2, TYPES[array.dtype.name]) + field(8, name)
    return field(5, b"".join([said, field(9, array.tobytes()), *more]))


def op(kind, inputs, output, **attributes):
    said = b"".join(field(1, name) for name in inputs) + field(2, output) + field(4, kind)
    for key, value in attributes.items():
        number = 4 if isinstance(value, str) else 3
        said += field(5, field(1, key) + field(number, value) + field(20, 3 if number == 4 else 2))
    return field(1, said)


def argument(name, number, *lengths):
    """An input of a graph with its type; of an axis a number or a name."""
    axes = b"".join(field(1, field(1 if isinstance(n, int) else 2, n)) for n in lengths)
    return field(11, field(1, name) + field(2, field(1, field(1, number) + field(2, axes))))


def dense(path, *more, opset=21, dtype=np.float32, outside=False):
    """y = einsum(relu((x A) B + b), C); A is an argument, B lies [out, in]."""
    nodes = [
        op("MatMul", ["x", "a/w"], "h"),
        op("Gemm", ["h", "b/w", "b"], "g", transB=1),
        op("Relu", ["g"], "r"),
        op("Einsum", ["r", "c/w"], "y", equation="bk,kn->bn"),
        *more,
    ]
    held = [tensor(name, array.astype(dtype)) for name, array in {"b/w": B.T, "c/w": C}.items()]
    held.append(tensor("b", BIAS.astype(dtype), *[field(14, 1)] * outside))
    inputs = [argument("a/w", TYPES[np.dtype(dtype).name], 64, 48), field(11, field(1, "x"))]
    graph = b"".join([*nodes, field(2, "g"), *held, *inputs, field(12, field(1, "y"))])
    path.write_bytes(field(1, 10) + field(8, field(1, "") + field(2, opset)) + field(7, graph))
    return {"model": path}


def one(message, number):
    return next((f.value for f in message if f.number == number), None)


def run(path, x):
    """The model's results, and how many nodes of each type it has."""
    graph = list(fields(one(list(fields(path.read_bytes())), 7)))
    values, ops = {"x": x}, []
    for entry in (list(fields(f.value)) for f in graph if f.number == 5):
        shape = [f.value for f in entry if f.number == 1]
        dtype = {1: np.float32, 2: np.uint8, 10: np.float16}[one(entry, 2)]
        values[bytes(one(entry, 8)).decode()] = np.frombuffer(one(entry, 9), dtype).reshape(shape)
    for entry in (list(fields(f.value)) for f in graph if f.number == 1):
        names = [bytes(f.value).decode() for f in entry if f.number == 1]
        (out,), kind = [bytes(f.value).decode() for f in entry if f.number == 2], bytes(one(entry, 4)).decode()
        said = {bytes(one(a, 1)).decode(): one(a, 3) for a in (list(fields(f.value)) for f in entry if f.number == 5)}
        ins = [values[name] for name in names]
        ops.append(kind)
        if kind == "MatMulNBits":
            assert bytes(one(entry, 7)) == b"com.microsoft" and said["accuracy_level"] == 1
            values[out] = ins[0] @ weights(*ins[1:], **said).T
        else:
            values[out] = {"Relu": lambda v: np.maximum(v, 0), "Add": np.add}[kind](*ins)
    inputs = [bytes(one(list(fields(f.value)), 1)).decode() for f in graph if f.number == 11]
    return values["y"], ops, inputs


def apart(data, bits, n):
    """Numbers of b bits along the last axis of bytes."""
    single = np.unpackbits(data, axis=-1, bitorder="little")[..., : n * bits].reshape(*data.shape[:-1], n, bits)
    return (single.astype(np.int64) << np.arange(bits)).sum(-1)


def weights(codes, scales, zeros=None, *, K, N, bits, block_size, accuracy_level):
    blocks = -(-K // block_size)
    assert codes.shape == (N, blocks, block_size * bits // 8) and scales.shape == (N, blocks)
    q = apart(codes.reshape(N, -1), bits, blocks * block_size).reshape(N, blocks, block_size)
    z = apart(zeros, bits, blocks) if zeros is not None else np.full((N, blocks), 1 << (bits - 1))
    return ((q - z[..., None]) * scales[..., None].astype(np.float64)).reshape(N, -1)[:, :K]


NAMES = [Name("(.)", r"\1.w", "io"), Name("bias", "b")]


def three(values, group=None, **options):
    """Forms of the three weights, and their numbers."""
    shapes = {"a": (64, 48), "b": (48, 32), "c": (32, 20)}
    made = {key: codes((k, n), (k // (group or k), n), values, **options) for key, (k, n) in shapes.items()}
    return {key: form for key, (form, _) in made.items()}, [dense for _, dense in made.values()]


@pytest.mark.parametrize(("values", "group", "zeros"), PRODUCTS)
def test_a_model_computes_what_the_forms_do(values, group, zeros, tmp_path):
    forms, (a, b, c) = three(values, group, zeros=zeros)
    names = [NAMES[0]]
    report = export(forms, tmp_path / "net.onnx", format="onnx", names=names, config=dense(tmp_path / "dense.onnx"))
    x = RNG.normal(size=(5, 64)).astype(np.float32)
    y, ops, inputs = run(tmp_path / "net.onnx", x)
    expected = np.maximum(x @ a @ b + BIAS, 0) @ c
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    assert ops == ["MatMulNBits", "MatMulNBits", "Add", "Relu", "MatMulNBits"] and inputs == ["x"]
    assert not report.changed


def test_floats_take_the_place_of_floats(tmp_path):
    forms, (a, b, c) = three(grid(-8, 7), 16)
    tree = {**forms, "bias": np.zeros(32, np.float32)}
    export(tree, tmp_path / "net.onnx", format="onnx", names=NAMES[::-1], config=dense(tmp_path / "dense.onnx"))
    x = RNG.normal(size=(5, 64)).astype(np.float32)
    expected = np.maximum(x @ a @ b, 0) @ c
    np.testing.assert_allclose(run(tmp_path / "net.onnx", x)[0], expected, rtol=1e-4, atol=1e-3)


BAD = ("no", "odd", "flat")


def test_what_is_refused(tmp_path):
    forms, odd = ({"a": three(grid(-8, 7), group)[0]["a"]} for group in (16, 8))
    twice = dense(tmp_path / "twice.onnx", op("Transpose", ["a/w"], "t"))
    plain = dense(tmp_path / "dense.onnx")
    (tmp_path / "no.onnx").write_bytes(b"\xff" * 40)
    (tmp_path / "odd.onnx").write_bytes(field(7, field(1, field(1, 3))))  # a number for a name
    (tmp_path / "flat.onnx").write_bytes(field(7, field(5, 3)))
    for tree, names, config, message in [
        (forms, NAMES[:1], {}, r"expected config=\{'model': path\} of the dense function in ONNX"),
        *((forms, NAMES[:1], {"model": tmp_path / f"{n}.onnx"}, f"{n}.onnx: expected an ONNX model") for n in BAD),
        (
            forms,
            [Name("a", "w", "io")],
            plain,
            r"a: expected the name of an initializer or input .* got 'w'; these are b.w",
        ),
        (forms, NAMES[:1], twice, r"a: expected 'a/w' to be used in products x W alone, got Transpose too"),
        (odd, NAMES[:1], plain, r"a: expected groups that are multiples of 16"),
    ]:
        with pytest.raises(ValueError, match=message):
            export(tree, tmp_path / "net.onnx", format="onnx", names=names, config=config)
        assert not (tmp_path / "net.onnx").exists()


def test_scales_have_the_dtype_of_the_model(tmp_path):
    """MatMulNBits takes scales of the activations' type alone, and so do sums with a bias."""
    (forms, (a, b, c)), config = (
        three(grid(-8, 7), 16, scale="float32"),
        dense(tmp_path / "half.onnx", dtype=np.float16),
    )
    report = export({**forms, "bias": BIAS}, tmp_path / "net.onnx", format="onnx", names=NAMES, config=config)
    assert {row.why for row in report.changed} == {"scales to float16", "float32 to float16"}
    graph = list(fields(one(list(fields((tmp_path / "net.onnx").read_bytes())), 7)))
    assert {one(list(fields(f.value)), 2) for f in graph if f.number == 5} == {2, 10}
    x = RNG.normal(size=(5, 64)).astype(np.float32)
    expected = np.maximum(x @ a @ b + BIAS, 0) @ c
    np.testing.assert_allclose(run(tmp_path / "net.onnx", x)[0], expected, rtol=0, atol=2e-3 * np.abs(expected).max())


@pytest.mark.parametrize("format", ["onnx", "onnx_dequantize"])
def test_what_does_not_fit_the_model(tmp_path, format):
    forms = {"a": three(grid(-8, 7), 16)[0]["a"]}
    plain, apart = dense(tmp_path / "dense.onnx"), dense(tmp_path / "apart.onnx", outside=True)
    (tmp_path / "other").mkdir()
    for tree, names, config, message in [
        (forms, [Name("a", "a.w", "oi")], plain, r"a: expected the shape \[64, 48\], as 'a/w' has .* got \[48, 64\]"),
        ({"a": BIAS}, NAMES[:1], plain, r"a: expected the shape \[64, 48\], as 'a/w' has in the model, got \[32\]"),
        ({"bias": np.arange(32)}, NAMES[1:], plain, r"bias: expected float32, got int64; make it another"),
        (forms, NAMES[:1], dense(tmp_path / "f64.onnx", dtype=np.float64), r"a: expected a weight of float32, float16"),
        (forms, NAMES[:1], apart, r"net.onnx: expected to stand beside .*apart.onnx, as 1 of its weights .* b among"),
    ]:
        with pytest.raises(ValueError, match=message):
            export(tree, tmp_path / "other" / "net.onnx", format=format, names=names, config=config)
    export(forms, tmp_path / "net.onnx", format=format, names=NAMES[:1], config=apart)
