"""GGUF files: every type of blocks against a decoder that goes number by number; forms of the same codes; bad files."""

import random
import struct

import numpy as np
import pytest

import lcq
from lcq.cli.main import main
from lcq.io.checkpoints.checkpoint import read, read_checkpoint
from lcq.io.checkpoints.gguf import BLOCKS as GGUF_BLOCKS
from tests.io.checkpoints.gguf_bytes import BLOCKS, field, gguf, random_blocks, text, values

FIELDS = b"".join(
    [
        field("general.architecture", 8, text("llama")),
        field("llama.attention.head_count", 4, struct.pack("<I", 9)),
        field("llama.attention.layer_norm_rms_epsilon", 6, struct.pack("<f", 1e-5)),
        field("tokenizer.ggml.add_bos_token", 7, b"\x01"),
        field("tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, 2) + text("a") + text("\u0120b")),
        field("tokenizer.ggml.scores", 9, struct.pack("<IQ", 6, 2) + struct.pack("<2f", 0, 1)),
    ]
)


def whole():
    w = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)
    tensors = {
        "token_embd.weight": ((3, 4), 0, w.tobytes()),
        "half": ((2, 3), 1, w.reshape(-1)[:6].astype("<f2").tobytes()),
        "short": ((4,), 30, (w.reshape(-1)[:4].view(np.uint32) >> 16).astype("<u2").tobytes()),
        "blk.0.attn_q.weight": ((2, 64), 2, random_blocks("Q4_0", 4).tobytes()),
    }
    return w, gguf(tensors, FIELDS, 6)


def test_names_numbers_and_fields(tmp_path):
    w, data = whole()
    (tmp_path / "net.gguf").write_bytes(data)
    found = read_checkpoint(tmp_path / "net.gguf")
    assert list(found.tree) == ["token_embd.weight", "half", "short", "blk.0.attn_q.weight"] and found.layout == "oi"
    np.testing.assert_array_equal(found.tree["token_embd.weight"], w)
    np.testing.assert_array_equal(found.tree["half"], w.reshape(-1)[:6].reshape(2, 3).astype(np.float16))
    assert found.tree["short"].dtype.name == "bfloat16"
    np.testing.assert_allclose(found.tree["short"].astype(np.float32), w.reshape(-1)[:4], rtol=1e-2)
    assert found.metadata == {
        "general.architecture": "llama",
        "llama.attention.head_count": "9",
        "llama.attention.layer_norm_rms_epsilon": "1e-05",
        "tokenizer.ggml.add_bos_token": "true",
    }


def test_lazily(tmp_path):
    """Each slice is that of the dense tensor; nothing is read before."""
    (tmp_path / "net.gguf").write_bytes(whole()[1])
    dense, lazy = read(tmp_path / "net.gguf"), read(tmp_path / "net.gguf", lazy=True)
    blocks, plain = lazy["blk.0.attn_q.weight"], lazy["token_embd.weight"]
    for name, leaf in lazy.items():
        assert leaf.shape == dense[name].shape and leaf.dtype == dense[name].dtype
        np.testing.assert_array_equal(np.asarray(leaf), dense[name])
    whole_blocks = dense["blk.0.attn_q.weight"]
    for index in [0, (1,), (slice(0, 1), 3), (1, slice(2, 9)), (slice(None), slice(1, 3)), ..., ([1, 0], 2), -1]:
        np.testing.assert_array_equal(blocks[index], whole_blocks[index])
        np.testing.assert_array_equal(plain[index], dense["token_embd.weight"][index])
    (tmp_path / "net.gguf").write_bytes(whole()[1][:-40])
    with pytest.raises(ValueError, match="attn_q"):
        read(tmp_path / "net.gguf", lazy=True)


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(tmp_path, name):
    number, length, _, halves, _ = BLOCKS[name]
    data = random_blocks(name, 6)
    (tmp_path / "net.gguf").write_bytes(gguf({"w": ((3, 2 * length), number, data.tobytes())}))
    expected = values(name, data).reshape(3, 2 * length)
    np.testing.assert_allclose(read(tmp_path / "net.gguf")["w"], expected, rtol=1e-6, atol=1e-6)
    form = read(tmp_path / "net.gguf", forms=True)["w"]
    error = ((np.asarray(form.dense(), np.float64) - expected) ** 2).sum() / (expected**2).sum()
    assert error < (1e-13 if len(halves) == 2 else 1e-30 if name != "IQ4_XS" else 1e-14)
    assert form.shape == (3, 2 * length) and form.packed is not None


@pytest.mark.filterwarnings("ignore:.*encountered in multiply")
@pytest.mark.parametrize("block", GGUF_BLOCKS.values(), ids=lambda block: block.name)
def test_blocks_as_the_package_decodes_them(block):
    """Those of llama.cpp's own package, of any bytes whose numbers are finite."""
    gguf = pytest.importorskip("gguf")
    data = np.random.default_rng(0).integers(0, 256, (400, block.size), dtype=np.uint8)
    expected = gguf.dequantize(data, gguf.GGMLQuantizationType(block.number))
    finite = np.isfinite(expected).all(1)
    assert finite.sum() > 300
    np.testing.assert_array_equal(block.values(block.unpack(data)).reshape(400, -1)[finite], expected[finite])


def test_blocks_that_are_constant(tmp_path):
    """A scale of 0 beside a minimum: no zero says that."""
    data = random_blocks("Q4_1", 4)
    data[0, :2] = data[2, :4] = 0
    (tmp_path / "net.gguf").write_bytes(gguf({"w": ((2, 64), 3, data.tobytes())}))
    expected = values("Q4_1", data).reshape(2, 64)
    for found in (read(tmp_path / "net.gguf")["w"], read(tmp_path / "net.gguf", forms=True)["w"].dense()):
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
        assert np.ptp(found[0, :32]) == 0 and found[0, 0] != 0 and not found[1, :32].any()


def test_codes_of_q4_1_come_out_as_they_went_in(tmp_path):
    from lcq.io.layouts import BLOCK_TYPES
    from lcq.io.layouts.gguf_blocks import Blocks

    data = random_blocks("Q4_1", 200)
    (tmp_path / "net.gguf").write_bytes(gguf({"w": ((10, 640), 3, data.tobytes())}))
    form = read(tmp_path / "net.gguf", forms=True)["w"].unpack()
    minimum = (-np.asarray(form.zero) * np.asarray(form.scale, np.float32)).astype(np.float16)
    blocks = Blocks(np.asarray(form.codes).reshape(10, 20, 32), np.asarray(form.scale), minimum)
    np.testing.assert_array_equal(BLOCK_TYPES["Q4_1"].pack(blocks).reshape(200, 20), data)


def test_the_command_line(tmp_path, capsys):
    path, out = tmp_path / "net.gguf", tmp_path / "net.lcq"
    path.write_bytes(whole()[1])
    assert main(["import", str(path), "-o", str(out)]) == 0
    forms = lcq.load(out)
    np.testing.assert_array_equal(forms["blk.0.attn_q.weight"].dense(), read(path)["blk.0.attn_q.weight"])
    assert "blk.0.attn_q.weight" in capsys.readouterr().out
    assert main(["compress", str(path), "--rule", 'blk.*=Uniform(4, per="channel")', "--dry-run"]) == 0
    assert "has weights in the layout oi; rules without '; layout=oi'" in capsys.readouterr().err
    assert main(["compress", str(path), "--rule", 'blk.*=Uniform(4, per="channel"); layout=oi', "--dry-run"]) == 0
    assert "note" not in capsys.readouterr().err
    lcq.io.write(tmp_path / "net.npz", {"w": np.ones(3)})
    assert main(["import", str(tmp_path / "net.npz"), "-o", str(out), "--force"]) == 1
    assert "expected weights that are codes, got arrays alone" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"expected a \.safetensors or \.npz file, .*lcq\.io\.export writes \.gguf"):
        lcq.io.write(tmp_path / "other.gguf", {"w": np.ones(3)})


# What anyone may have written


def info(name, axes, kind, begin):
    return text(name) + struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, kind, begin)


def head(tensors, fields, body):
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, fields) + body


BAD = {
    "nothing": (b"", "expected 4 bytes at 0"),
    "another magic": (b"GGML" + bytes(100), "does not begin with GGUF"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "expected version 2 or 3, little-endian, got 50331648"),
    "many tensors": (head(1 << 60, 0, b""), "expected tensors of 24 bytes each"),
    "many fields": (head(0, 1 << 60, b""), "expected fields of 13 bytes each"),
    "a long name": (head(0, 1, struct.pack("<Q", 1 << 62) + bytes(20)), "bytes at 32, got 20"),
    "a long array": (head(0, 1, field("a", 9, struct.pack("<IQ", 12, 1 << 61))), "bytes at"),
    "many strings": (head(0, 1, field("a", 9, struct.pack("<IQ", 8, 1 << 61))), "expected strings of 8 bytes each"),
    "deep arrays": (head(0, 1, field("a", 9, struct.pack("<IQ", 9, 1) * 9)), "at most 4 deep"),
    "a kind of field": (head(0, 1, field("a", 13, bytes(8))), "expected a field of a kind up to 12, got 13"),
    "a field twice": (head(0, 2, field("a", 0, b"\0") * 2), "'a': this field is there twice"),
    "alignment 3": (head(0, 1, field("general.alignment", 4, struct.pack("<I", 3))), "expected a power of 2, got"),
    "five axes": (head(1, 0, info("w", (1,) * 5, 0, 0)), "at most 4 axes, got 5"),
    "a tensor twice": (head(2, 0, info("w", (0,), 0, 0) * 2), "expected a new tensor"),
    "a vast shape": (head(1, 0, info("w", (1 << 62, 1 << 62), 0, 0)), "at most 64 axes and 2^63 elements"),
    "data beyond the end": (head(1, 0, info("w", (8,), 0, 1 << 20)), "up to 0, got 1048576"),
    "an odd place": (head(1, 0, info("w", (8,), 0, 4) + bytes(64)), "a multiple of 32"),
    "two in one place": (head(2, 0, info("w", (2,), 0, 0) + info("v", (2,), 0, 0) + bytes(64)), "at the same place"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(tmp_path, case):
    data, complaint = BAD[case]
    (tmp_path / "net.gguf").write_bytes(data)
    with pytest.raises(ValueError) as caught:
        read(tmp_path / "net.gguf")
    assert complaint in str(caught.value) and "net.gguf: not a GGUF file, or damaged" in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "complaint"),
    [
        ({"w": ((4, 8), 0, bytes(64))}, "w: expected 128 bytes before the next tensor or the end, got 64"),
        ({"w": ((4, 8), 0, bytes(64)), "v": ((1,), 0, bytes(4))}, "w: expected 128 bytes before the next tensor"),
        ({"w": ((2, 48), 2, bytes(64))}, r"w: expected rows of blocks of 32 for Q4_0, got the shape \[2, 48\]"),
        ({"w": ((1, 256), 16, bytes(128))}, "w: expected a type of numbers, or one of Q4_0, .*got the type 16; write"),
    ],
)
def test_tensors_that_are_not_what_they_say(tmp_path, tensors, complaint):
    (tmp_path / "net.gguf").write_bytes(gguf(tensors))
    with pytest.raises(ValueError, match=complaint):
        read(tmp_path / "net.gguf")


def test_a_file_of_no_tensors(tmp_path):
    (tmp_path / "net.gguf").write_bytes(gguf({}))
    assert read(tmp_path / "net.gguf") == {}


def test_damaged_files(tmp_path):
    path, data, rng = tmp_path / "net.gguf", whole()[1], random.Random(0)
    for _ in range(60):
        path.write_bytes(data[: rng.randrange(len(data) - 100)])
        with pytest.raises(ValueError, match=r"net\.gguf: "):
            read(path)
    for _ in range(200):
        at = rng.randrange(400)
        path.write_bytes(data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :])
        try:
            read(path)
        except ValueError as error:
            assert str(error).startswith(str(path))
