"""Codes of compressed-tensors, GPTQ and fp8, packed here bit by bit: they come in as forms of the same codes."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import lcq
from lcq.cli.main import main
from lcq.io.checkpoints.checkpoint import read, read_checkpoint
from lcq.schemes import Uniform

OUT, IN, GROUP = 8, 64, 32
X = "model.layers.0.q_proj"


def stream(codes, bits):
    """int32 words of each row, code i at bits b i .. of one little-endian number."""
    words = []
    for row in codes:
        number = sum(int(code) << bits * i for i, code in enumerate(row))
        many = -(-len(row) * bits // 32)
        words.append([number >> 32 * j & 0xFFFFFFFF for j in range(many)])
    return np.array(words, np.uint32).view(np.int32)


def made(bits, *, symmetric, seed=0):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 1 << bits, (OUT, IN))
    scale = rng.normal(size=(OUT, IN // GROUP)).astype(np.float16)
    zero = np.full(scale.shape, 1 << (bits - 1)) if symmetric else rng.integers(0, 1 << bits, scale.shape)
    value = (codes - np.repeat(zero, GROUP, 1)) * np.repeat(scale, GROUP, 1).astype(np.float64)
    return codes, scale, zero, value


def folder(path, tensors, config):
    path.mkdir()
    lcq.io.write(path / "model.safetensors", tensors | {"norm.weight": np.ones(3, np.float32)}, {"format": "pt"})
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": config}))
    return path


def compressed(path, bits, *, symmetric, **changed):
    codes, scale, zero, value = made(bits, symmetric=symmetric)
    tensors = {f"{X}.weight_packed": stream(codes, bits), f"{X}.weight_scale": scale}
    tensors[f"{X}.weight_shape"] = np.array([OUT, IN])
    if not symmetric:
        tensors[f"{X}.weight_zero_point"] = np.ascontiguousarray(stream(zero.T, bits).T)
    weights = {"num_bits": bits, "group_size": GROUP, "symmetric": symmetric}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    config |= {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}
    tensors = {name: array for name, array in (tensors | changed).items() if array is not None}
    return folder(path, tensors, config), codes, scale, zero, value


def gptq(path, bits, *, symmetric, version="gptq", **changed):
    codes, scale, zero, value = made(bits, symmetric=symmetric)
    stored = (zero - (version == "gptq")) % (1 << bits)
    tensors = {
        f"{X}.qweight": np.ascontiguousarray(stream(codes, bits).T),
        f"{X}.scales": np.ascontiguousarray(scale.T),
    }
    tensors |= {f"{X}.qzeros": stream(stored.T, bits), f"{X}.g_idx": (np.arange(IN) // GROUP).astype(np.int32)}
    config = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "checkpoint_format": version}
    return folder(path, tensors | changed, config), codes, scale, zero, value


KINDS = [
    (compressed, {"bits": 4, "symmetric": True}),
    (compressed, {"bits": 3, "symmetric": True}),
    (compressed, {"bits": 4, "symmetric": False}),
    (compressed, {"bits": 8, "symmetric": False}),
    (gptq, {"bits": 4, "symmetric": True}),
    (gptq, {"bits": 3, "symmetric": False}),
    (gptq, {"bits": 8, "symmetric": False}),
    (gptq, {"bits": 4, "symmetric": False, "version": "gptq_v2"}),
]


@pytest.mark.parametrize(("make", "settings"), KINDS)
def test_codes_come_in_as_they_are(tmp_path, make, settings):
    path, codes, scale, zero, value = make(tmp_path / "hf", **settings)
    found = read_checkpoint(path, forms=True)
    assert set(found.tree) == {f"{X}.weight", "norm.weight"} and found.layout == "oi"
    form = found.tree[f"{X}.weight"].unpack()
    np.testing.assert_array_equal(form.codes, codes)
    np.testing.assert_array_equal(form.scale, scale)
    assert (form.zero is None) == settings["symmetric"]
    if form.zero is not None:
        np.testing.assert_array_equal(form.zero, zero)
    nearest = value.astype(np.float16)
    np.testing.assert_array_equal(form.dense(), nearest)
    dense = read(path)[f"{X}.weight"]
    assert dense.dtype == np.float16
    np.testing.assert_array_equal(dense, nearest)
    np.testing.assert_array_equal(read(path / "model.safetensors")[f"{X}.weight"], nearest)


def test_a_compressed_checkpoint_is_a_file_of_lcq(tmp_path, capsys):
    path, *_, value = compressed(tmp_path / "hf", 4, symmetric=True)
    assert main(["import", str(path), "-o", str(tmp_path / "net.lcq")]) == 0
    forms = lcq.load(tmp_path / "net.lcq")
    np.testing.assert_array_equal(forms[f"{X}.weight"].dense(), value.astype(np.float16))
    assert lcq.sizes(forms)[f"{X}.weight"].bits == OUT * IN * 4 + scale_bits()
    x = jnp.ones((2, IN), jnp.float32)
    y = lcq.packed(lambda p, x: x @ p[f"{X}.weight"].T)(forms, x)
    np.testing.assert_allclose(y, x @ value.astype(np.float16).T.astype(np.float32), rtol=1e-2, atol=5e-2)


def scale_bits():
    return OUT * IN // GROUP * 16


def test_columns_in_another_order(tmp_path):
    """actorder: the groups of columns are no runs; dense they are right, and codes are refused."""
    order = np.random.default_rng(1).permutation(np.arange(IN) // GROUP).astype(np.int32)
    for make in (gptq, compressed):
        name = "g_idx" if make is gptq else "weight_g_idx"
        path, codes, scale, zero, _ = make(tmp_path / make.__name__, 4, symmetric=False, **{f"{X}.{name}": order})
        value = (codes - zero[:, order]) * scale[:, order].astype(np.float64)
        np.testing.assert_array_equal(read(path)[f"{X}.weight"], value.astype(np.float16))
        with pytest.raises(ValueError, match=f"{X}: expected groups of neighbouring columns, .*read it dense"):
            read(path, forms=True)


def test_bytes_of_int8_and_float8(tmp_path):
    rng = np.random.default_rng(0)
    codes, scale = rng.integers(-128, 128, (OUT, IN)).astype(np.int8), rng.normal(size=(OUT, 1)).astype(np.float32)
    config = {"quant_method": "compressed-tensors", "format": "int-quantized"}
    path = folder(tmp_path / "int8", {f"{X}.weight": codes, f"{X}.weight_scale": scale}, config)
    form = read(path, forms=True)[f"{X}.weight"]
    np.testing.assert_array_equal(np.asarray(form.unpack().codes, np.int16) - 128, codes)
    np.testing.assert_allclose(read(path)[f"{X}.weight"], codes * scale, rtol=1e-7)
    eight = rng.normal(size=(OUT, IN)).astype(jnp.float8_e4m3fn)
    config = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    path = folder(tmp_path / "fp8", {f"{X}.weight": eight, f"{X}.weight_scale": scale}, config)
    for found in (read(path)[f"{X}.weight"], read(path, forms=True)[f"{X}.weight"].dense()):
        np.testing.assert_allclose(found, eight.astype(np.float32) * scale, rtol=1e-7)
    blocks = rng.normal(size=(2, 4)).astype(np.float32)  # of 5 by 16: the last has 3 rows
    config = {"quant_method": "fp8", "weight_block_size": [5, 16]}
    path = folder(tmp_path / "blocks", {f"{X}.weight": eight, f"{X}.weight_scale_inv": blocks}, config)
    whole = np.repeat(np.repeat(blocks, 5, 0)[:OUT], 16, 1)
    for found in (read(path)[f"{X}.weight"], read(path, forms=True)[f"{X}.weight"].dense()):
        np.testing.assert_allclose(found, eight.astype(np.float32) * whole, rtol=1e-7)


def test_what_is_not_known_stays_as_it_is(tmp_path):
    tensors = {f"{X}.qweight": np.ones((2, 2), np.int32)}
    path = folder(tmp_path / "awq", tensors, {"quant_method": "awq", "bits": 4})
    np.testing.assert_array_equal(read(path)[f"{X}.qweight"], 1)
    with pytest.raises(ValueError, match=r"expected weights quantized by compressed-tensors, gptq, fp8.*got 'awq'"):
        read(path, forms=True)
    (path / "config.json").write_text('{"quantization_config": {"quant_method": [3]}}')
    np.testing.assert_array_equal(read(path)[f"{X}.qweight"], 1)
    (path / "config.json").unlink()
    np.testing.assert_array_equal(read(path, forms=True)[f"{X}.qweight"], 1)


@pytest.mark.parametrize(
    ("make", "changed", "complaint"),
    [
        (compressed, {f"{X}.weight_shape": None}, "weight_shape: expected two lengths"),
        (compressed, {f"{X}.weight_shape": np.array([OUT, 1 << 40])}, "expected rows of"),
        (compressed, {f"{X}.weight_shape": np.array([OUT + 1, IN])}, r"weight_packed: expected int32 \[9, words\]"),
        (
            compressed,
            {f"{X}.weight_scale": np.ones((OUT, 3), np.float16)},
            r"expected floating-point scales \[8, groups",
        ),
        (compressed, {f"{X}.weight_scale": np.ones((OUT, 2), np.int32)}, "expected floating-point scales"),
        (gptq, {f"{X}.scales": np.ones((2, OUT + 1), np.float16)}, r"qweight: expected int32 \[words, 9\]"),
        (gptq, {f"{X}.qzeros": np.ones((3, 1), np.int32)}, "qzeros: expected"),
        (gptq, {f"{X}.g_idx": np.full(IN, 9, np.int32)}, "g_idx: expected 64 groups below 2"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, make, changed, complaint):
    path, *_ = make(tmp_path / "hf", 4, symmetric=True, **changed)
    with pytest.raises(ValueError, match=f"{X}: {complaint}"):
        read(path)


def test_short_rows_of_several_widths(tmp_path):
    """40 bits are two words, in which 10 codes of 6 bits would have their place too: the group's targets decide."""
    rng = np.random.default_rng(0)
    codes = {4: rng.integers(0, 16, (OUT, 10)), 8: rng.integers(0, 256, (OUT, 10))}
    tensors = {f"m{b}.weight_packed": stream(c, b) for b, c in codes.items()}
    tensors |= {f"m{b}.weight_scale": np.ones((OUT, 1), np.float32) for b in codes}
    tensors |= {f"m{b}.weight_shape": np.array([OUT, 10]) for b in codes}
    groups = {f"group_{b}": {"targets": [f"m{b}"], "weights": {"num_bits": b}} for b in codes}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    found = read(folder(tmp_path / "named", tensors, config | {"config_groups": groups}))
    for b in codes:
        np.testing.assert_array_equal(found[f"m{b}.weight"], codes[b] - (1 << (b - 1)))
    for group in groups.values():
        group["targets"] = ["Linear"]
    found = read(folder(tmp_path / "fits", tensors, config | {"config_groups": groups}))
    np.testing.assert_array_equal(found["m4.weight"], codes[4] - 8)
    four = {name: tensor for name, tensor in tensors.items() if name.startswith("m4")}
    with pytest.raises(ValueError, match=r"m4: .*got 2 words for 10, which may be of 4 or 5 or 6"):
        read(folder(tmp_path / "none", four, config))


@pytest.mark.parametrize("rows", [6, 7])
def test_blocks_of_float8_whose_last_is_short(tmp_path, rows):
    """6 rows in blocks of 4 are 4 and 2, although 2 scales divide them."""
    rng = np.random.default_rng(0)
    eight, scale = rng.normal(size=(rows, 8)).astype(jnp.float8_e4m3fn), rng.normal(size=(2, 2)).astype(np.float32)
    for said in ([4, 4], "4x4"):
        weights = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": said}
        config = {"quant_method": "compressed-tensors", "format": "float-quantized"}
        config |= {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}
        path = folder(tmp_path / str(said), {f"{X}.weight": eight, f"{X}.weight_scale": scale}, config)
        want = eight.astype(np.float32) * np.repeat(np.repeat(scale, 4, 0)[:rows], 4, 1)
        np.testing.assert_array_equal(read(path)[f"{X}.weight"], want)


def test_where_a_config_says_it(tmp_path):
    """Several formats in one file; a model of texts and images; the name that the key had before; an infinity."""
    path, *_, value = compressed(tmp_path / "hf", 4, symmetric=True)
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    mixed = config | {"format": "mixed-precision"}
    mixed["config_groups"] = {"g": config["config_groups"]["group_0"] | {"format": "pack-quantized"}}
    for said in (
        {"quantization_config": mixed, "time_step_limit": [0.0, float("inf")]},
        {"text_config": {"quantization_config": config}},
        {"compression_config": config},
    ):
        (path / "config.json").write_text(json.dumps(said))
        np.testing.assert_array_equal(read(path)[f"{X}.weight"], value.astype(np.float16))


def test_one_scale_for_a_tensor_of_float8(tmp_path):
    eight = np.random.default_rng(0).normal(size=(OUT, IN)).astype(jnp.float8_e4m3fn)
    tensors = {f"{X}.weight": eight, f"{X}.weight_scale": np.full((), 0.25, np.float32)}
    path = folder(tmp_path / "hf", tensors, {"quant_method": "fp8", "activation_scheme": "static"})
    np.testing.assert_array_equal(read(path)[f"{X}.weight"], eight.astype(np.float32) / 4)
    with pytest.raises(ValueError, match="got codes; leave it out"):
        read(path, lazy=True)


@pytest.mark.parametrize("lazy", [False, True])
def test_scales_that_are_left_out_are_told(tmp_path, lazy):
    eight = np.ones((OUT, IN), jnp.float8_e4m3fn)
    tensors = {f"{X}.weight": eight, f"{X}.weight_scale": np.full((), 0.25, np.float32)}
    path = folder(tmp_path / "hf", tensors, {"quant_method": "modelopt", "quant_algo": "FP8"})
    (path / "config.json").unlink() if lazy else None
    with pytest.warns(UserWarning, match=f"{X}.weight and 0 others are read without the scales"):
        assert read(path, lazy=lazy)[f"{X}.weight"].dtype == eight.dtype


def test_configs_that_are_none(tmp_path):
    path, *_ = compressed(tmp_path / "hf", 4, symmetric=True)
    (path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json: expected JSON"):
        read(path)
    lcq.io.write(tmp_path / "hf" / "plain.safetensors", {"w": np.ones(2)})
    assert list(read(path / "plain.safetensors")) == ["w"]  # whose neighbours are nobody's business
    (path / "plain.safetensors").unlink()
    (path / "config.json").write_text("[3]")
    with pytest.raises(ValueError, match=r"config.json: expected an object of JSON, got list"):
        read(path)


def test_what_lcq_quantizes_comes_back(tmp_path):
    """The codes of a scheme, packed as GPTQ and read again."""
    w = np.random.default_rng(2).normal(size=(IN, OUT)).astype(np.float32)
    form = Uniform(4, per=GROUP, zero_point=True, scale_dtype="float16").project(w)
    codes, scale, zero = (np.asarray(a) for a in (form.codes, form.scale, form.zero))
    tensors = {f"{X}.qweight": np.ascontiguousarray(stream(codes.T, 4).T), f"{X}.scales": scale}
    tensors |= {f"{X}.qzeros": stream((zero.astype(int) - 1) % 16, 4)}
    path = folder(tmp_path / "hf", tensors, {"quant_method": "gptq", "bits": 4})
    back = read(path, forms=True)[f"{X}.weight"].unpack()
    np.testing.assert_array_equal(back.codes, codes.T)
    np.testing.assert_array_equal(
        np.asarray(back.dense(), np.float32), np.asarray(form.dense().T.astype(np.float16), np.float32)
    )
