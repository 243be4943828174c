"""GGUF: files read by a reader of our own and decoded; types are chosen, metadata typed, rows turned."""

import dataclasses
import struct

import jax.numpy as jnp
import numpy as np
import pytest

import lcq
from lcq.io import Name, export, llama_names, open_gguf
from lcq.io.layouts import BLOCK_TYPES, SUPERBLOCK_TYPES, TENSOR_DTYPES, TENSOR_TYPES
from tests.io.checkpoints.gguf_bytes import gguf, q4_k, q5_k, random_blocks
from tests.io.exports.made import codes, grid, weights

RNG = np.random.default_rng(0)
W = RNG.normal(size=(512, 6)).astype(np.float32)
LLAMA = {"general.architecture": "llama"}
KINDS = ["u1", "i1", "u2", "i2", "u4", "i4", "f4", "?", None, None, "u8", "i8", "f8"]


class Reader:
    """A GGUF file by ggml/docs/gguf.md: metadata with types, and weights in float32."""

    def __init__(self, path):
        self.data, self.at = path.read_bytes(), 4
        assert self.data[:4] == b"GGUF"
        version, tensors, keys = self.take("<IQQ")
        assert version == 3
        self.metadata = {self.text(): self.value() for _ in range(keys)}
        entries = [(self.text(), self.take(f"<{self.take('<I')[0]}Q"), self.take("<IQ")) for _ in range(tensors)]
        start = -(-self.at // 32) * 32
        names = {number: name for name, number in TENSOR_TYPES.items()}
        names |= {block.number: name for name, block in (BLOCK_TYPES | SUPERBLOCK_TYPES).items()}
        self.kinds = {name: names[number] for name, _, (number, _) in entries}
        self.tensors, end = {}, start
        for name, axes, (_, offset) in entries:
            assert offset % 32 == 0 and start + offset == end
            self.tensors[name], end = self.weights(name, axes[::-1], end)
            end = -(-end // 32) * 32
        assert end == len(self.data)

    def take(self, form):
        found = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return found

    def text(self):
        (size,) = self.take("<Q")
        self.at += size
        return self.data[self.at - size : self.at].decode()

    def value(self, kind=None):
        kind = self.take("<I")[0] if kind is None else kind
        if kind == 8:
            return self.text()
        if kind == 9:
            inner, count = self.take("<IQ")
            return [self.value(inner) for _ in range(count)]
        dtype = np.dtype(KINDS[kind])
        self.at += dtype.itemsize
        return np.frombuffer(self.data, dtype, 1, self.at - dtype.itemsize)[0]

    def weights(self, name, shape, begin):
        kind, count = self.kinds[name], int(np.prod(shape))
        if kind in TENSOR_DTYPES:
            size = count * TENSOR_DTYPES[kind].itemsize
            return np.frombuffer(self.data[begin : begin + size], TENSOR_DTYPES[kind]).reshape(shape), begin + size
        block = (BLOCK_TYPES | SUPERBLOCK_TYPES)[kind]
        size = count // block.length * block.size
        data = np.frombuffer(self.data[begin : begin + size], np.uint8).reshape(-1, block.size)
        return block.values(block.unpack(data)).reshape(shape), begin + size


E2M1 = (-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
IO, BY_32 = (512, 6), (16, 6)
GRIDS = {
    "Q4_0": codes(IO, BY_32, grid(-8, 7)),
    "Q4_0 of 3 bits": codes(IO, (8, 6), grid(-4, 3)),
    "Q4_0 of binary": codes(IO, BY_32, (-1.0, 1.0)),
    "Q4_0 by channel": codes(IO, (1, 6), grid(-8, 7), scale="float32"),
    "Q4_1": codes(IO, BY_32, grid(0, 15), zeros=True),
    "Q5_0": codes(IO, BY_32, grid(-16, 15)),
    "Q5_0 of e2m1": codes(IO, BY_32, E2M1, scale="float32"),
    "Q5_1": codes(IO, BY_32, grid(0, 31), zeros=True, scale="float32"),
    "Q8_0": codes(IO, BY_32, grid(-128, 127)),
    "TQ2_0": codes(IO, (2, 6), grid(-1, 1)),
    "TQ2_0 of four levels": codes(IO, (2, 6), grid(-1, 2)),
    "TQ2_0 turned": codes(IO, (1, 1), grid(-2, 1)),
    "Q4_0 of ternary": codes(IO, BY_32, grid(-1, 1)),
}


@pytest.mark.parametrize("name", GRIDS)
def test_blocks_decode_to_the_same_weights_but_for_float16(name, tmp_path):
    form, dense = GRIDS[name]
    (row,) = export({"up": {"kernel": form}}, tmp_path / "net.gguf", format="gguf", config=LLAMA).rows
    file = Reader(tmp_path / "net.gguf")
    assert file.kinds["up.weight"] == name.split()[0]
    moved = np.linalg.norm(file.tensors["up.weight"] - dense.T) / np.linalg.norm(dense)
    assert moved < 5e-4
    np.testing.assert_allclose(row.error, moved, rtol=0.02, atol=2e-7)


@pytest.mark.parametrize("name", ["TQ1_0", "MXFP4", "Q8_0"])
def test_a_type_may_be_chosen(name, tmp_path):
    form, _ = codes(IO, BY_32, E2M1) if name == "MXFP4" else codes(IO, (2, 6), grid(-1, 1))
    if name == "MXFP4":
        scale = np.exp2(RNG.integers(-3, 3, BY_32)).astype(np.float32) * RNG.choice([-1, 1], BY_32)
        form = dataclasses.replace(form, scale=scale.astype(np.float32))
    names = [Name("w", "w.weight", "io", type=name)]
    export({"w": form}, tmp_path / "net.gguf", format="gguf", names=names, config=LLAMA)
    file = Reader(tmp_path / "net.gguf")
    assert file.kinds["w.weight"] == name
    np.testing.assert_allclose(file.tensors["w.weight"], weights(form).T, rtol=5e-4)


def test_golden_bytes(tmp_path):
    whole = np.arange(32, dtype=np.uint8).reshape(32, 1) % 16
    form = lcq.forms.Codes(whole, scale=np.full((1, 1), -0.5, np.float32), values=grid(-8, 7))
    export({"kernel": form}, tmp_path / "net.gguf", format="gguf", config={"general.architecture": "x"})
    one, key, name = "0100000000000000", b"general.architecture".hex(), b"weight".hex()
    expected = "4747554603000000" + 2 * one + f"1400000000000000{key}08000000{one}78"
    expected += f"0600000000000000{name}020000002000000000000000{one}02000000" + "00" * 8
    data = (tmp_path / "net.gguf").read_bytes()
    assert data.hex().startswith(expected)
    assert data[-32:].hex() == "00b8" + "".join(f"{i:x}{i:x}" for i in range(16)) + "00" * 14


def test_zeros_of_any_size_are_minima(tmp_path):
    """Codes that came from Q4_1, m / d not whole, go out as they came in."""
    scale = RNG.normal(size=(1, 16, 6)).astype(np.float16).reshape(16, 6)
    minimum = RNG.normal(size=(16, 6)).astype(np.float16)
    whole = RNG.integers(0, 16, IO).astype(np.uint8)
    form = lcq.forms.Codes(whole, scale=scale, zero=-minimum.astype(np.float32) / scale, values=grid(0, 15))
    export({"kernel": form}, tmp_path / "net.gguf", format="gguf", config=LLAMA)
    data = np.frombuffer((tmp_path / "net.gguf").read_bytes()[-20 * 96 :], np.uint8).reshape(6, 16, 20)
    blocks = BLOCK_TYPES["Q4_1"].unpack(data)
    np.testing.assert_array_equal(blocks.scale, scale.T)
    np.testing.assert_array_equal(blocks.minimum, minimum.T)
    np.testing.assert_array_equal(blocks.codes.reshape(6, 512), whole.T)


def test_scales_in_steps(tmp_path):
    """Words in a file, of which blocks and layers are taken apart; Q4_1 has a scale and a minimum of its own."""
    w = RNG.normal(size=(2, 64, 6)).astype(np.float32)
    rules = [lcq.Rule("w", lcq.Uniform(4, per=32, zero_point=True, scale_bits=6), stacked=1)]
    forms = lcq.compress({"w": w}, rules)
    lcq.save(tmp_path / "net.lcq", forms)
    names = [Name("w", "{0}.w", "io", stacked=1)]
    dense = np.asarray(forms["w"].dense(), np.float64)
    for i, source in enumerate((forms, tmp_path / "net.lcq", lcq.load(tmp_path / "net.lcq"))):
        report = export(source, path := tmp_path / f"{i}.gguf", format="gguf", names=names, config=LLAMA)
        assert [row.what for row in report.rows] == ["Q4_1 in groups of 32"] * 2
        for layer in (0, 1):
            np.testing.assert_allclose(Reader(path).tensors[f"{layer}.w"].T, dense[layer], rtol=0, atol=5e-3)


@pytest.mark.parametrize("name", ["Q4_K", "Q5_K", "Q4_K of 3 bits"])
def test_scales_in_steps_are_those_of_k_quants(name, tmp_path):
    """As an independent reader has them: units become float16, all else is as it is."""
    kind, bits = name[:4], 3 if " " in name else int(name[1])
    scheme = lcq.Uniform(bits, per=32, zero_point=True, scale_bits=6)
    forms = lcq.compress({"w": RNG.normal(size=(2, 512, 6)).astype(np.float32)}, [lcq.Rule("w", scheme, stacked=1)])
    lcq.save(tmp_path / "net.lcq", forms)
    names, size = [Name("w", "{0}.w", "io", stacked=1)], SUPERBLOCK_TYPES[kind].size
    read = {"Q4_K": q4_k, "Q5_K": q5_k}[kind]
    for i, source in enumerate((forms, tmp_path / "net.lcq")):
        report = export(source, path := tmp_path / f"{i}.gguf", format="gguf", names=names, config=LLAMA)
        assert [row.what for row in report.rows] == [f"{kind} in groups of 32"] * 2
        file = Reader(path)
        for layer in (0, 1):
            dense = np.asarray(forms["w"].dense(), np.float64)[layer]
            slip = np.linalg.norm(file.tensors[f"{layer}.w"].T - dense) / np.linalg.norm(dense)
            assert slip < 2e-3
            np.testing.assert_allclose(report.rows[layer].error, slip, rtol=0.02, atol=2e-7)
        blocks = np.frombuffer(path.read_bytes()[-12 * size :], np.uint8).reshape(12, size)  # of the last layer
        values = np.concatenate([read(block.tolist()) for block in blocks])
        np.testing.assert_allclose(values, file.tensors["1.w"].reshape(-1), rtol=1e-5, atol=1e-7)


def test_units_that_float16_holds_move_nothing(tmp_path):
    w = RNG.normal(size=(256, 3)).astype(np.float32) * 64
    form = lcq.Uniform(4, per=32, zero_point=True, scale_bits=6).project(w)
    (row,) = export({"kernel": form}, tmp_path / "net.gguf", format="gguf", config=LLAMA).rows
    assert row.what == "Q4_K in groups of 32" and not row.error
    np.testing.assert_allclose(Reader(tmp_path / "net.gguf").tensors["weight"].T, form.dense(), rtol=1e-5, atol=1e-4)


def test_small_weights_move_in_k_quants_and_less_in_blocks_with_scales_of_their_own(tmp_path):
    w = RNG.normal(size=(256, 3)).astype(np.float32) * 1e-3
    form = lcq.Uniform(4, per=32, zero_point=True, scale_bits=6).project(w)
    errors = {}
    for name in ("Q4_K", "Q4_1"):
        names = [Name("kernel", "weight", "io", type=name)]
        (row,) = export({"kernel": form}, path := tmp_path / "net.gguf", format="gguf", names=names, config=LLAMA).rows
        slip = np.linalg.norm(Reader(path).tensors["weight"].T - form.dense()) / np.linalg.norm(form.dense())
        np.testing.assert_allclose(row.error, slip, rtol=0.02)
        errors[name] = slip
    assert errors["Q4_1"] < 1e-3 < errors["Q4_K"] < 0.05


def k_quants(name, tensors=3):
    """Bytes of blocks as llama.cpp writes them: units above 0, the largest of a block's scales the most that there is,
    and none 0, which would say a constant."""
    data = random_blocks(name, 2 * tensors)
    if name == "Q6_K":
        data[:, 192], data[:, 209] = 128, data[:, 209] & 127
        return data
    data[:, [1, 3]] &= 127
    data[:, 4:8] |= 1
    data[:, 12:] = np.where(np.arange(data.shape[1] - 12) < 4, data[:, 12:] | 1, data[:, 12:])
    data[:, [4, 8]] |= 63
    return data


@pytest.mark.parametrize("name", ["Q4_K", "Q5_K", "Q6_K"])
def test_k_quants_come_out_as_they_went_in(name, tmp_path):
    """Byte for byte, if their type is said; six bits in groups of 16 need no word."""
    data, number = k_quants(name), SUPERBLOCK_TYPES[name].number
    (tmp_path / "in.gguf").write_bytes(gguf({"w": ((3, 512), number, data.tobytes())}))
    forms = lcq.io.read(tmp_path / "in.gguf", forms=True)
    names = [Name("w", "w", "oi", type=None if name == "Q6_K" else name)]
    (row,) = export(forms, tmp_path / "out.gguf", format="gguf", names=names, config=LLAMA).rows
    assert row.what.startswith(name) and not row.error
    made = np.frombuffer((tmp_path / "out.gguf").read_bytes()[-data.nbytes - (-data.nbytes % 32) :], np.uint8)
    np.testing.assert_array_equal(made[: data.size].reshape(data.shape), data)
    np.testing.assert_array_equal(lcq.io.read(tmp_path / "out.gguf")["w"], lcq.io.read(tmp_path / "in.gguf")["w"])


def test_a_group_that_is_a_constant_goes_out_as_one(tmp_path):
    data = k_quants("Q4_K")
    data[:, 5] &= 192  # a scale of 0 beside a minimum
    data[:, 9] |= 1
    (tmp_path / "in.gguf").write_bytes(gguf({"w": ((3, 512), 12, data.tobytes())}))
    forms = lcq.io.read(tmp_path / "in.gguf", forms=True)
    export(forms, tmp_path / "out.gguf", format="gguf", names=[Name("w", "w", "oi", type="Q4_K")], config=LLAMA)
    np.testing.assert_array_equal(lcq.io.read(tmp_path / "out.gguf")["w"], lcq.io.read(tmp_path / "in.gguf")["w"])


@pytest.mark.parametrize("bits", [4, 5])
def test_units_of_a_row_stay_steps(bits, tmp_path):
    """What `export` made of scales of 6 bits is read as such, and goes out again as the same bytes."""
    w = RNG.normal(size=(512, 6)).astype(np.float32) * 64
    w[:, 2] = 0
    form = lcq.Uniform(bits, per=32, zero_point=True, scale_bits=6).project(w)
    export({"kernel": form}, tmp_path / "in.gguf", format="gguf", config=LLAMA)
    forms = lcq.io.read(tmp_path / "in.gguf", forms=True)
    assert forms["weight"].scale_bits == 6 and forms["weight"].shape == (6, 512)
    forms["weight"].check_stored()
    dense = lcq.io.read(tmp_path / "in.gguf")["weight"]
    np.testing.assert_allclose(forms["weight"].dense(), dense, rtol=1e-5, atol=1e-4)
    lcq.save(tmp_path / "net.lcq", forms)
    names = [Name("weight", "weight", "oi")]
    export(tmp_path / "net.lcq", tmp_path / "out.gguf", format="gguf", names=names, config=LLAMA)
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "in.gguf").read_bytes()


@pytest.mark.parametrize(
    ("scheme", "name"),
    [
        (lcq.Uniform(4, per=32, zero_point=True), "Q4_K"),
        (lcq.Uniform(5, per=64, zero_point=True), "Q5_K"),
        (lcq.Uniform(6, per=16), None),
        (lcq.Uniform(4, per=32), "Q6_K"),
        (lcq.Uniform(6, per="channel"), "Q6_K"),
    ],
)
def test_scales_of_their_own_become_multiples_of_units(scheme, name, tmp_path):
    """As a K-quant has them, if the name says so: the report says how far that moves the weights."""
    form = scheme.project(W)
    names = [Name("w", "w", "io", type=name)]
    (row,) = export({"w": form}, tmp_path / "net.gguf", format="gguf", names=names, config=LLAMA).rows
    assert row.what.split()[0] == (name or "Q6_K")
    dense = np.asarray(form.dense(), np.float64)
    slip = np.linalg.norm(Reader(tmp_path / "net.gguf").tensors["w"].T - dense) / np.linalg.norm(dense)
    assert slip < 0.03
    np.testing.assert_allclose(row.error, slip, rtol=0.02, atol=2e-7)


EXPERTS = {
    "Q4_0": (codes((3, 64, 8), (3, 2, 8), grid(-8, 7)), "io"),
    "Q4_0, a scale for all": (codes((3, 64, 8), (1, 1, 1), grid(-8, 7)), "io"),
    "Q4_1": (codes((3, 8, 64), (3, 8, 2), grid(0, 15), zeros=True), "oi"),
    "Q8_0": (codes((3, 4, 2, 32), (3, 4, 2, 1), grid(-128, 127)), "ooi"),
}


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_stay_an_axis(name, tmp_path):
    """As llama.cpp has them, [experts, outputs, inputs]; a file read is one to write."""
    (form, dense), layout = EXPERTS[name]
    names = [Name("up", "blk.0.ffn_up_exps.weight", layout, experts=1)]
    lcq.save(tmp_path / "net.lcq", {"up": form})
    (row,) = export(tmp_path / "net.lcq", path := tmp_path / "net.gguf", format="gguf", names=names, config=LLAMA).rows
    file = Reader(path)
    wanted = dense.swapaxes(1, 2) if layout == "io" else dense.reshape(3, 8, -1)
    assert file.kinds["blk.0.ffn_up_exps.weight"] == row.what.split()[0] == name.split(",")[0]
    np.testing.assert_allclose(file.tensors["blk.0.ffn_up_exps.weight"], wanted, rtol=2e-3, atol=5e-4)
    forms = lcq.io.read(path, forms=True)
    assert forms["blk.0.ffn_up_exps.weight"].shape == wanted.shape
    again = [Name("(.*)", r"\1", "oi", experts=1)]
    export(forms, tmp_path / "again.gguf", format="gguf", names=again, config=LLAMA)
    assert (tmp_path / "again.gguf").read_bytes() == path.read_bytes()


def test_experts_of_layers_and_in_units_and_dense(tmp_path):
    w = RNG.normal(size=(2, 3, 256, 4)).astype(np.float32)
    rule = lcq.Rule("up", lcq.Uniform(4, per=32, zero_point=True, scale_bits=6), stacked=2)
    forms = lcq.compress({"up": w, "down": w}, [rule])
    names = [Name("(up|down)", r"blk.{0}.ffn_\1_exps.weight", "io", stacked=1, experts=1)]
    rows = export(forms, path := tmp_path / "net.gguf", format="gguf", names=names, config=LLAMA).rows
    assert [row.what.split()[0] for row in rows] == ["F32", "F32", "Q4_K", "Q4_K"]
    file = Reader(path)
    for layer in (0, 1):
        np.testing.assert_array_equal(file.tensors[f"blk.{layer}.ffn_down_exps.weight"], w[layer].swapaxes(1, 2))
        dense = np.asarray(forms["up"].dense())[layer].swapaxes(1, 2)
        np.testing.assert_allclose(file.tensors[f"blk.{layer}.ffn_up_exps.weight"], dense, rtol=0, atol=0.02)


def test_experts_elsewhere(tmp_path):
    form, dense = EXPERTS["Q4_0"][0]
    name = Name("up", "up.weight", "io", experts=1)
    with pytest.raises(
        ValueError, match=r"up: expected a matrix, got axes 'wio' .* for layers or heads say lcq.io.Name"
    ):
        export({"up": form}, tmp_path / "net", format="compressed-tensors", names=[name])
    export({"up": dense.astype(np.float32)}, tmp_path / "net", format="compressed-tensors", names=[name])
    np.testing.assert_allclose(lcq.io.read(tmp_path / "net")["up.weight"], dense.swapaxes(1, 2), rtol=1e-6)
    with pytest.raises(ValueError, match=r"name 'w': expected experts= beside the layout of one expert .* layout=None"):
        Name("w", "w", experts=1)
    with pytest.raises(ValueError, match=r"w: expected at least 2 axes by the name .* lower stacked= or experts="):
        export(
            {"w": np.ones(2, np.float32)},
            tmp_path / "net.gguf",
            format="gguf",
            names=[Name("w", "w{0}", "oi", stacked=1, experts=1)],
            config=LLAMA,
        )


def test_arrays_and_their_types(tmp_path):
    tree = {
        "norm": {"scale": np.ones(5, jnp.bfloat16)},
        "half": {"kernel": W.astype(np.float16)},
        "cast": {"kernel": lcq.forms.Cast(W.astype(jnp.bfloat16))},
        "forced": {"kernel": W},
        "whole": np.arange(3, dtype=np.int32),
    }
    names = [Name("forced/kernel", "forced.weight", "io", type="F16")]
    rows = export(tree, tmp_path / "net.gguf", format="gguf", names=names, config=LLAMA).rows
    file = Reader(tmp_path / "net.gguf")
    kinds = {"norm.weight": "F32", "half.weight": "F16", "cast.weight": "BF16", "forced.weight": "F16", "whole": "I32"}
    assert file.kinds == kinds and [row.leaf for row in rows if row.error] == ["forced/kernel"]
    np.testing.assert_array_equal(file.tensors["forced.weight"], W.T.astype(np.float16))
    np.testing.assert_array_equal(file.tensors["whole"], np.arange(3))


def test_numbers_of_metadata_are_as_wide_as_they_have_to_be(tmp_path):
    """A list of int32 would wrap round, a float of 1e300 be infinite."""
    said = {
        "small": [1, -2],
        "ids": [5, 2**32 - 1],
        "wide": [2**40],
        "most": [2**64 - 1],
        "big": 1e300,
        "bigs": [1, 1e-300],
    }
    config = LLAMA | {f"x.{key}": value for key, value in said.items()}
    export({"w": np.ones((2, 2), np.float32)}, tmp_path / "net.gguf", format="gguf", config=config)
    found = {key: field.value for key, field in open_gguf(tmp_path / "net.gguf").fields.items()}
    for key, value in said.items():
        np.testing.assert_array_equal(found[f"x.{key}"], value)
    assert found["x.small"].dtype == np.int32
    for bad in (2**64, [2**64, 1], [1, "a"], None):
        with pytest.raises(ValueError, match=r"x.bad: expected a string, a number"):
            export({"w": np.ones(2)}, tmp_path / "no.gguf", format="gguf", config=LLAMA | {"x.bad": bad})


def test_what_llama_cpp_does_not_read(tmp_path):
    for tree, message in (
        ({"w": np.ones((1, 1, 1, 1, 2), np.float32)}, r"w: expected at most 4 axes, got \[1, 1, 1, 1, 2\]"),
        ({"w" * 64: np.ones(2, np.float32)}, "expected a name of at most 63 bytes"),
    ):
        with pytest.raises(ValueError, match=message):
            export(tree, tmp_path / "net.gguf", format="gguf", config=LLAMA)


def test_metadata_keep_their_types(tmp_path):
    given = {
        "general.architecture": "llama",
        "a.flag": True,
        "a.count": 7,
        "a.below": -7,
        "a.byte": np.uint8(3),
        "a.part": 0.5,
        "a.names": ["x", "é"],
        "a.kinds": [1, 2],
        "a.scores": np.float32([0.5, 1]),
    }
    export({"w": np.ones(2, np.float32)}, tmp_path / "net.gguf", format="gguf", config=given)
    found = Reader(tmp_path / "net.gguf").metadata
    kinds = [str(np.asarray(value).dtype) for value in list(found.values())[1:6]]
    assert kinds == ["bool", "uint32", "int32", "uint8", "float32"]
    assert found["a.names"] == ["x", "é"] and found["a.kinds"] == [1, 2] and found["a.scores"] == [0.5, 1]
    with pytest.raises(ValueError, match=r"a.b: expected a string, a number, or a list of either, got \{\}"):
        export({"w": W}, tmp_path / "net.gguf", format="gguf", config={**LLAMA, "a.b": {}})


CONFIG = {
    "model_type": "llama",
    "max_position_embeddings": 64,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
}


def test_a_llama_has_its_names_keys_and_order_of_pairs(tmp_path):
    q, dense_q = codes((64, 64), (64, 2), grid(-128, 127))
    k, dense_k = RNG.normal(size=(2, 32, 64)).astype(np.float32)
    layer = "model.layers.0.self_attn."
    tree = {
        "model.embed_tokens.weight": W[:8, :4],
        layer + "q_proj.weight": q,
        layer + "k_proj.weight": dense_k,
        layer + "v_proj.weight": k,
        "model.layers.0.mlp.down_proj.weight": q,
        "model.layers.0.input_layernorm.weight": np.ones(4, np.float32),
        "model.norm.weight": np.ones(4, np.float32),
        layer + "q_proj.bias": np.arange(64, dtype=np.float32),
        layer + "v_proj.bias": np.arange(32, dtype=np.float32),
        layer + "rotary_emb.inv_freq": np.ones(8, np.float32),
    }
    report = export(tree, tmp_path / "net.gguf", format="gguf", names=llama_names(4, 2), config=CONFIG)
    file = Reader(tmp_path / "net.gguf")
    assert [row.name for row in report.rows] == list(file.tensors)
    turned = dense_q.reshape(4, 2, 8, 64).swapaxes(1, 2).reshape(64, 64)
    np.testing.assert_allclose(file.tensors["blk.0.attn_q.weight"], turned, rtol=5e-4)
    np.testing.assert_allclose(file.tensors["blk.0.ffn_down.weight"], dense_q, rtol=5e-4)
    turned = dense_k.reshape(2, 2, 8, 64).swapaxes(1, 2).reshape(32, 64)
    np.testing.assert_array_equal(file.tensors["blk.0.attn_k.weight"], turned)
    np.testing.assert_array_equal(file.tensors["blk.0.attn_v.weight"], k)
    turned = np.arange(64).reshape(4, 2, 8).swapaxes(1, 2).reshape(64)
    np.testing.assert_array_equal(file.tensors["blk.0.attn_q.bias"], turned)
    np.testing.assert_array_equal(file.tensors["blk.0.attn_v.bias"], np.arange(32))
    assert not [name for name in file.tensors if "inv_freq" in name]
    assert file.metadata["llama.attention.head_count_kv"] == 2 and file.metadata["llama.rope.freq_base"] == 1e4
    assert len(report.notes) == 1 and "without a tokenizer" in report.notes[0]
    tree["model.layers.0.odd.weight"] = k
    report = export(tree, tmp_path / "odd.gguf", format="gguf", names=llama_names(4, 2), config=CONFIG)
    assert "does not know these names of a llama, model.layers.0.odd.weight and 0 more" in report.notes[0]


FOUR = codes(IO, BY_32, grid(-8, 7))[0]
REFUSED = [
    (codes(IO, (32, 6), grid(-8, 7))[0], {}, r"kernel: expected codes that .* levels -8 .. 7 in groups of 16"),
    (codes((48, 6), (1, 6), grid(-8, 7))[0], {}, r"Q4_0 has a scale for 32 inputs, these one for 48; Q5_0"),
    (codes(IO, BY_32, grid(0, 255), zeros=True)[0], {}, r"levels 0 .. 255 with zeros .*: Q4_1 has no such levels"),
    (FOUR, {"names": [Name(".*", "w", "io", type="Q4_2")]}, r"kernel: expected type= one of Q4_0"),
    (FOUR, {"names": [Name(".*", "w", "io", type="Q4_1")]}, r"Q4_1 has no such levels"),
    (
        FOUR,
        {"names": [Name(".*", "w", "io", type="Q4_K")]},
        r"expected for Q4_K levels 0 .. 15 with zeros .* got codes K=16",
    ),
    (FOUR, {"names": [Name(".*", "w", "io", type="Q5_K")]}, r"compress with lcq.Uniform\(4, per=32, zero_point=True"),
    (
        codes((48, 6), (3, 6), grid(-32, 31))[0],
        {"names": [Name(".*", "w", "io", type="Q6_K")]},
        r"for Q6_K levels -32 .. 31 in groups of 16 of a multiple of 256 inputs, got .* of 48 inputs",
    ),
    (
        dataclasses.replace(codes(IO, BY_32, grid(0, 15), zeros=True)[0], zero=np.full(BY_32, -1, np.float32)),
        {"names": [Name(".*", "w", "io", type="Q4_K")]},
        r"kernel: expected groups whose least weight is at most 0, got one above; compress with zeros",
    ),
    (W > 0, {}, r"kernel: expected one of float32, .* got bool"),
    (W * 1e9, {"names": [Name(".*", "w", "io", type="F16")]}, r"kernel: expected numbers that float16 holds"),
    (W, {"config": {}}, r"config: expected general.architecture, or model_type 'llama', got None"),
    (W, {"config": {"model_type": "llama"}}, r"config: expected max_position_embeddings, hidden_size, .* got none"),
    (W, {"path": "net.bin"}, r"net.bin: expected a name that ends in .gguf"),
]


@pytest.mark.parametrize(("form", "options", "message"), REFUSED)
def test_what_is_refused(form, options, message, tmp_path):
    options = {"format": "gguf", "config": LLAMA, **options}
    with pytest.raises(ValueError, match=message):
        export({"kernel": form}, tmp_path / options.pop("path", "net.gguf"), **options)
    assert not list(tmp_path.glob("*"))
