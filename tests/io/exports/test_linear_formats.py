"""compressed-tensors and GPTQ: files read by safetensors and decoded here bit by bit; codes and values as they were."""

import dataclasses
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import lcq
from lcq.io import Name, export
from tests.io.exports.made import codes, grid

RNG = np.random.default_rng(0)
IN, OUT = 64, 32
W = RNG.normal(size=(IN, OUT)).astype(np.float32)


def bits_along(words, bits, n):
    """Codes along the first axis of int32 words, a bit at a time."""
    whole = np.unpackbits(np.ascontiguousarray(words.T).view(np.uint8), axis=1, bitorder="little")
    apart = whole[:, : n * bits].reshape(len(whole), n, bits)
    return (apart.astype(np.int64) << np.arange(bits)).sum(-1).T


def compressed_tensors(tensors, name, bits, shifted):
    out, inputs = tensors[f"{name}.weight_shape"]
    q = bits_along(tensors[f"{name}.weight_packed"].T, bits, inputs).T
    scale = tensors[f"{name}.weight_scale"].astype(np.float64)
    groups = scale.shape[1]
    z = np.full(scale.shape, 1 << (bits - 1))
    if shifted:
        z = bits_along(tensors[f"{name}.weight_zero_point"], bits, out)
    spread = [np.repeat(a, inputs // groups, axis=1) for a in (z, scale)]
    return (q - spread[0]) * spread[1]


def gptq(tensors, name, bits, version):
    words, scale, group = (tensors[f"{name}.{part}"] for part in ("qweight", "scales", "g_idx"))
    q = bits_along(words, bits, len(group))
    z = bits_along(tensors[f"{name}.qzeros"].T, bits, scale.shape[1]).T
    z = z + (version == 1)  # without a mask, as the libraries do
    return ((q - z[group]) * scale.astype(np.float64)[group]).T


GROUPS = (IN // 32, OUT)
GRIDS = {
    "4 bits in groups": codes((IN, OUT), GROUPS, grid(-8, 7)),
    "3 bits in groups": codes((IN, OUT), GROUPS, grid(-4, 3)),
    "2 bits with zeros": codes((IN, OUT), (IN // 16, OUT), grid(0, 3), zeros=True),
    "8 bits by channel": codes((IN, OUT), (1, OUT), grid(-128, 127), scale="float32"),
    "4 bits with zeros": codes((IN, OUT), GROUPS, grid(0, 15), zeros=True),
    "one bit with zeros": codes((IN, OUT), GROUPS, grid(0, 1), zeros=True),
    "symmetric": codes((IN, OUT), GROUPS, grid(-7, 7), scale="float16"),
    "binary": codes((IN, OUT), GROUPS, (-1.0, 1.0)),
    "ternary, one scale": codes((IN, OUT), (1, 1), grid(-1, 1), scale="float32"),
    "powers of two": codes((IN, OUT), (1, OUT), (-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0)),
    "lopsided": codes((IN, OUT), GROUPS, grid(-1, 2)),
    "not scaled": codes((IN, OUT), (1, 1), (-0.5, 0.0, 0.5), scale=None),
    "five bits": codes((IN, OUT), GROUPS, grid(-16, 15), scale="float32"),
    "thirds": codes((IN, OUT), GROUPS, (-0.375, 0.0, 0.375)),
}


@pytest.mark.parametrize("name", GRIDS)
def test_compressed_tensors_decode_to_the_same_weights(name, tmp_path):
    form, dense = GRIDS[name]
    report = export({"up": {"kernel": form}}, tmp_path / "net", format="compressed-tensors")
    tensors = safetensors.numpy.load_file(tmp_path / "net" / "model.safetensors")
    said = json.loads((tmp_path / "net" / "config.json").read_text())["quantization_config"]
    weights = said["config_groups"]["group_0"]["weights"]
    decoded = compressed_tensors(tensors, "up", weights["num_bits"], not weights["symmetric"])
    np.testing.assert_allclose(decoded, dense.T, rtol=1e-6)
    assert not report.changed and report.bytes == sum(a.nbytes for a in tensors.values())
    assert weights["num_bits"] == {"powers of two": 4, "five bits": 5, "8 bits by channel": 8}.get(
        name, int(name[0]) if name[0].isdigit() else 4 if name == "symmetric" else 2
    )


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("version", [1, 2])
def test_gptq_decodes_to_the_same_weights_but_for_float16(name, version, tmp_path):
    form, dense = GRIDS[name]
    (row,) = export({"up": {"kernel": form}}, tmp_path / "net", format="gptq" if version == 1 else "gptq_v2").rows
    tensors = safetensors.numpy.load_file(tmp_path / "net" / "model.safetensors")
    said = json.loads((tmp_path / "net" / "quantize_config.json").read_text())
    decoded = gptq(tensors, "up", said["bits"], version)
    np.testing.assert_allclose(decoded, dense.T, rtol=5e-4, atol=1e-6)
    moved = np.linalg.norm(decoded - dense.T) / np.linalg.norm(dense)
    np.testing.assert_allclose(row.error, moved, rtol=0.01, atol=1e-7)
    assert said["checkpoint_format"] == ("gptq" if version == 1 else "gptq_v2")


def test_golden_bytes(tmp_path):
    """Codes 0 .. 15 of an input each, written out by hand."""
    whole = np.arange(32, dtype=np.uint8).reshape(8, 4) % 16
    form = lcq.forms.Codes(whole, scale=np.ones((1, 4), jnp.bfloat16), values=grid(-8, 7))
    export({"up.kernel": form}, tmp_path / "ct", format="compressed-tensors")
    tensors = safetensors.numpy.load_file(tmp_path / "ct" / "model.safetensors")
    expected = [0xC840C840, 0xD951D951, 0xEA62EA62, 0xFB73FB73]
    assert [int(w) & 0xFFFFFFFF for w in tensors["up.weight_packed"].ravel()] == expected
    assert tensors["up.weight_scale"].dtype == jnp.bfloat16 and tensors["up.weight_shape"].tolist() == [4, 8]
    wide = lcq.forms.Codes(np.tile(whole, (1, 2)), scale=np.ones((1, 8), np.float32), values=grid(-8, 7))
    export({"up.kernel": wide}, tmp_path / "gptq", format="gptq")
    tensors = safetensors.numpy.load_file(tmp_path / "gptq" / "model.safetensors")
    assert [int(w) & 0xFFFFFFFF for w in tensors["up.qweight"].ravel()] == expected * 2
    assert [int(w) & 0xFFFFFFFF for w in tensors["up.qzeros"].ravel()] == [0x77777777]


def test_layers_of_a_stack_and_layouts_from_a_file(tmp_path):
    up, dense_up = codes((3, OUT, IN), (3, OUT, IN // 32), grid(-8, 7))
    down, dense_down = codes((3, OUT, IN), (1, 1, 1), grid(0, 15), zeros=True)
    q, dense_q = codes((IN, 4, 8), (2, 4, 8), grid(-8, 7))
    o, dense_o = codes((4, 8, IN), (1, 1, IN), grid(-8, 7))
    layers = {"up": up, "down": down}
    tree = {"layers": layers, "q": q, "o": o, "norm": {"scale": np.ones(4, np.float32)}, "drop": np.ones(2)}
    names = [
        Name(r"layers/(\w+)", r"model.layers.{0}.\1.weight", layout="oi", stacked=1),
        Name("q", "q.weight", layout="ioo"),
        Name("o", "o.weight", layout="iio"),
        Name("drop", None),
    ]
    lcq.save(tmp_path / "net.lcq", tree)
    report = export(tmp_path / "net.lcq", tmp_path / "net", format="compressed-tensors", names=names)
    assert [row.name for row in report.rows][:2] == ["model.layers.0.down.weight", "model.layers.1.down.weight"]
    tensors = safetensors.numpy.load_file(tmp_path / "net" / "model.safetensors")
    for i in range(3):
        decoded = compressed_tensors(tensors, f"model.layers.{i}.up", 4, False)
        np.testing.assert_allclose(decoded, dense_up[i], rtol=1e-6)
        decoded = compressed_tensors(tensors, f"model.layers.{i}.down", 4, True)
        np.testing.assert_allclose(decoded, dense_down[i], rtol=1e-6)
    decoded = compressed_tensors(tensors, "q", 4, False)
    np.testing.assert_allclose(decoded, dense_q.reshape(IN, 32).T, rtol=1e-6)
    decoded = compressed_tensors(tensors, "o", 4, False)
    np.testing.assert_allclose(decoded, dense_o.reshape(32, IN).T, rtol=1e-6)
    np.testing.assert_array_equal(tensors["norm.weight"], np.ones(4))
    assert "drop" not in tensors


def test_what_is_said_of_layers_that_differ(tmp_path):
    tree = {
        "a": {"kernel": codes((IN, OUT), GROUPS, grid(-8, 7))[0]},
        "b": {"kernel": codes((IN, OUT), (1, OUT), grid(-128, 127))[0]},
        "c": {"kernel": codes((IN, OUT), GROUPS, grid(0, 15), zeros=True)[0]},
        "plain": {"kernel": W},
        "embed": {"embedding": W},
    }
    export(tree, tmp_path / "net", format="compressed-tensors", config={"model_type": "llama"})
    config = json.loads((tmp_path / "net" / "config.json").read_text())
    said = config["quantization_config"]
    assert config["model_type"] == "llama" and said["ignore"] == ["embed", "plain", "lm_head"]
    every = said["config_groups"].values()
    groups = [(each["targets"], each["weights"]["num_bits"], each["weights"]["strategy"]) for each in every]
    assert groups == [(["a"], 4, "group"), (["b"], 8, "channel"), (["c"], 4, "group")]
    tensors = safetensors.numpy.load_file(tmp_path / "net" / "model.safetensors")
    np.testing.assert_array_equal(tensors["plain.weight"], W.T)
    np.testing.assert_array_equal(tensors["embed.weight"], W)
    with pytest.raises(ValueError, match=r"b/kernel: expected codes of 4 bits in groups of 32, as a/kernel has, got 8"):
        export(tree, tmp_path / "gptq", format="gptq")


class TestGptqSaysWhichLayersAreDense:
    """As GPTQModel 7.7, optimum 2.3 and vLLM 0.32 read it."""

    FORM = GRIDS["4 bits in groups"][0]
    CODED = ("model.layers.0.up", "model.layers.10.up", "lm_head")
    DENSE = ("model.layers.0.up2", "model.layers.1.up", "model.layers.0.gate", "model.layers.0.conv")

    def config(self, tree, folder):
        names = [Name(r"(.*norm)", r"\1.weight"), Name(r"(.*embed_tokens)", r"\1.weight")]
        names += [Name(r"(.*conv)", r"\1.weight", "oi"), Name("(.*)", r"\1.weight", "io")]
        export(tree, folder, format="gptq", names=[dataclasses.replace(name, optional=True) for name in names])
        said = json.loads((folder / "config.json").read_text())["quantization_config"]
        assert said == json.loads((folder / "quantize_config.json").read_text())
        return said

    def test_each_reader_finds_the_coded_ones(self, tmp_path):
        tree = dict.fromkeys(self.CODED, self.FORM) | dict.fromkeys(self.DENSE[:3], W)
        tree |= {self.DENSE[3]: np.ones((4, 2, 3), np.float32), "model.norm": np.ones(4), "model.embed_tokens": W}
        said = self.config(tree, tmp_path / "net")

        def left_out(module):
            return any(re.match(rule.removeprefix("-:"), module) for rule in said["dynamic"])

        kept = [name for names in said["modules_in_block_to_quantize"] for name in names]
        linear = (*self.CODED, *self.DENSE)
        assert all(rule.startswith("-:") for rule in said["dynamic"]) and said["lm_head"]
        assert [name for name in linear if not left_out(name)] == list(self.CODED)
        assert [name for name in linear if any(map(name.endswith, kept))] == list(self.CODED)
        served = [name for name in linear if any(each in name for each in kept) and not left_out(name)]
        assert served == list(self.CODED)
        assert not left_out("model.norm")

    def test_it_is_not_said_where_all_are_codes(self, tmp_path):
        tree = {"model.layers.0.up": self.FORM, "model.norm": np.ones(4), "model.embed_tokens": W, "lm_head": W}
        assert {"dynamic", "modules_in_block_to_quantize"}.isdisjoint(self.config(tree, tmp_path / "net"))

    def test_the_folder_is_read_back(self, tmp_path):
        self.config({"model.layers.0.up": self.FORM, "model.layers.0.gate": W}, tmp_path / "net")
        tree = lcq.io.read(tmp_path / "net")
        np.testing.assert_array_equal(tree["model.layers.0.gate.weight"], W.T)
        np.testing.assert_allclose(tree["model.layers.0.up.weight"], GRIDS["4 bits in groups"][1].T, rtol=5e-4)


def test_a_type_widens(tmp_path):
    form, dense = GRIDS["3 bits in groups"]
    tree = {"up": {"kernel": form}}
    export(tree, tmp_path / "net", format="gptq", names=[Name(".*", "up.weight", "io", type="int4")])
    tensors = safetensors.numpy.load_file(tmp_path / "net" / "model.safetensors")
    np.testing.assert_allclose(gptq(tensors, "up", 4, 1), dense.T, rtol=5e-4)
    with pytest.raises(ValueError, match="up/kernel: expected codes of at most int2 bits, got 3"):
        export(tree, tmp_path / "net", format="gptq", names=[Name(".*", "up.weight", "io", type="int2")])


FOUR, CT = codes((IN, OUT), (1, 1), grid(-8, 7))[0], {"format": "compressed-tensors"}
TABLE = lcq.forms.Codes(FOUR.codes % 5, levels=np.float32([[[-2, -0.937, 0, 0.711, 2]]]))
MASK = lcq.forms.Sparse(W > 1, W)
LARGE = dataclasses.replace(FOUR, scale=FOUR.scale.astype(np.float32) * 1e9)
REFUSED = [
    ({"w": FOUR}, {"names": [Name("w", "w.weight")]}, r"w: expected a name that says which axes .* say lcq.io.Name"),
    ({"w": FOUR}, {"names": [Name("w", "w", "io")]}, r"w: expected a name that ends in .weight"),
    ({"a/kernel": codes((IN, OUT), (1, 1), grid(-2048, 2047))[0]}, {}, r"a/kernel: expected codes of at most 8 bits"),
    (
        {"a/kernel": codes((IN, 3), (1, 1), grid(-8, 7))[0]},
        {"format": "gptq"},
        r"kernel: expected outputs whose 4 bits",
    ),
    ({"a/kernel": LARGE}, {"format": "gptq"}, r"a/kernel: expected scales that float16 holds, got some"),
    ({"__metadata__": W}, {}, r"__metadata__: expected another name, a safetensors file keeps its text there; rename"),
    ({"a/b": W, "a.b": W}, {}, r"expected a name of its own, got 'a.b', as"),
    ({"a/kernel": TABLE}, {}, r"a/kernel: expected levels that are multiples .* of 3 bits moves .* of 8 bits"),
    ({"a/kernel": MASK}, {}, r"a/kernel: expected codes on a grid .* nearest= writes it dense, 8,192"),
    ({"a/kernel": FOUR}, {"names": [Name("v", "v.weight")]}, r"name 'v' decides no leaf"),
    ({"a/kernel": FOUR}, {"nearest": 1}, r"nearest: expected 2 to 8 bits, got 1"),
    (
        {"q/bias": W.reshape(4, 8, -1)[..., 0]},
        {"names": [Name("q/bias", "q.bias", heads=4)]},
        r"q/bias: expected a name with heads= to say which axes of \[4, 8\] are outputs, .* layout='oo'",
    ),
    ({"conv/kernel": W[None]}, {"names": [Name(".*", "a", "io", heads=4)]}, r"conv/kernel: expected .* got axes 'wio'"),
    (
        {"up/kernel": codes((2, IN, OUT), (1, 1, 1), grid(-8, 7))[0]},
        {},
        r"got axes 'wio' of .* for layers or heads say lcq.io.Name\(.*stacked=1\), or layout='ioo', for experts",
    ),
    (
        {
            "up/kernel": dataclasses.replace(
                codes((IN, OUT), (1, 1), grid(0, 15), zeros=True)[0], zero=np.float32([[0.5]])
            )
        },
        {},
        r"up/kernel: expected zeros that are whole .* zero_point=True\) and without scale_bits, or choose GGUF",
    ),
    ({}, {}, r"^expected at least one leaf to write, got none: there are none; give forms"),
    ({"a/kernel": FOUR}, {"names": [Name(".*", None)]}, r"got none: names leave all leaves out; drop a Name"),
    ({"a/kernel": FOUR}, {"format": "onxx"}, r"expected one of the export formats compressed-tensors"),
]


@pytest.mark.parametrize(("tree", "options", "message"), REFUSED)
def test_what_is_refused(tree, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export(tree, tmp_path / "net", **CT | options)
    assert not list(tmp_path.glob("**/*.safetensors*"))


def test_the_nearest_is_written_if_asked_for(tmp_path):
    tree = {"table": {"kernel": TABLE}, "mask": {"kernel": MASK}}
    report = export(tree, tmp_path / "net", format="compressed-tensors", nearest=8)
    tensors = safetensors.numpy.load_file(tmp_path / "net" / "model.safetensors")
    np.testing.assert_array_equal(tensors["mask.weight"], np.where(W > 1, W, 0).T)
    dense = TABLE.levels[0, 0][TABLE.codes].T
    decoded = compressed_tensors(tensors, "table", 8, False)
    error = np.linalg.norm(decoded - dense) / np.linalg.norm(dense)
    rows = {row.leaf: row for row in report.rows}
    assert 0 < error < 0.01 and rows["table/kernel"].why == "a grid for 5 levels"
    np.testing.assert_allclose(rows["table/kernel"].error, error, rtol=1e-3)
    assert "made dense" in rows["mask/kernel"].why


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq"])
def test_codes_of_an_embedding_are_told(format, tmp_path):
    """Readers look for codes of linear layers alone."""
    form, _ = GRIDS["4 bits in groups"]
    names = {"model.embed_tokens.weight": True, "transformer.wte.weight": True, "embedder.proj.weight": False}
    for name, told in names.items():
        report = export({name: form}, tmp_path / name, format=format, names=[Name(".*", name, "io")])
        assert bool(report.notes) == told
    assert (
        "take codes of linear layers alone"
        in export({"w": form}, tmp_path / "net", format=format, names=[Name("w", "embed.weight", "io")]).notes[0]
    )


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq"])
def test_layers_that_vllm_joins_are_told(format, tmp_path):
    form, _ = GRIDS["4 bits in groups"]
    names = [Name("(.*)", r"model.layers.0.\1.weight", "io")]
    tree = {"self_attn.q_proj": form, "self_attn.k_proj": form, "self_attn.v_proj": W, "self_attn.o_proj": W}
    tree |= {"mlp.gate_proj": form, "mlp.up_proj": form, "mlp.down_proj": W}
    (note,) = export(tree, tmp_path / "net", format=format, names=names).notes
    assert "vLLM makes one layer of model.layers.0.self_attn.k_proj, model.layers.0.self_attn.q_proj" in note
    assert "others likewise" not in note
    assert not export(tree | {"self_attn.v_proj": form}, tmp_path / "all", format=format, names=names).notes
    if format == "compressed-tensors":
        eight = codes((IN, OUT), GROUPS, grid(-128, 127))[0]
        (note,) = export(
            tree | {"self_attn.v_proj": form, "mlp.up_proj": eight}, tmp_path / "w", format=format, names=names
        ).notes
        assert "one layer of model.layers.0.mlp.gate_proj, model.layers.0.mlp.up_proj," in note


def test_names_of_parts_that_another_leaf_has(tmp_path):
    """Two tensors of one name made a file that nothing opens."""
    form, _ = GRIDS["4 bits in groups"]
    for format, part in (("compressed-tensors", "x.weight_scale"), ("gptq", "x.g_idx")):
        with pytest.raises(ValueError, match=f"expected names of its own for what it becomes, got {part}, which"):
            export({"x/kernel": form, part: np.ones(3, np.float32)}, tmp_path / "net", format=format)
    assert not (tmp_path / "net").exists()


@pytest.mark.parametrize("layout", ["io", "oi"])
def test_filters_that_are_no_codes_are_those_of_pytorch(layout, tmp_path):
    """A net with a convolution goes out, whose dense layers are codes."""
    form, _ = GRIDS["4 bits in groups"]
    kernel = RNG.normal(size=(3, 2, 4, 8)).astype(np.float32)  # h, w, in, out
    wanted = kernel.transpose(3, 2, 0, 1)
    tree = {"conv": {"kernel": kernel} if layout == "io" else {"weight": wanted}, "fc": {"kernel": form}}
    export(tree, tmp_path / "net", format="compressed-tensors")
    np.testing.assert_array_equal(lcq.io.read(tmp_path / "net")["conv.weight"], wanted)
    filters = codes((3, 2, 4, 8), (1, 1, 1, 8), grid(-8, 7))[0]
    with pytest.raises(ValueError, match=r"got axes 'wwio' of .*: leave this leaf out of the rules"):
        export({"conv": {"kernel": filters}}, tmp_path / "no", format="compressed-tensors")


@pytest.mark.parametrize("stacked", [0, 1])
def test_a_bias_of_heads_and_units_is_one_of_outputs(stacked, tmp_path):
    """As flax's attention has it; rotary pairs that are halves lie side by side, as those of its kernel."""
    bias = np.arange(64, dtype=np.float32).reshape(2, 4, 8)
    tree = {"q/bias": bias if stacked else bias[0]}
    for heads, wanted in ((0, bias), (4, bias.reshape(2, 4, 2, 4).swapaxes(2, 3))):
        names = [Name("q/bias", "q{0}.bias" if stacked else "q0.bias", "oo", stacked=stacked, heads=heads)]
        export(tree, tmp_path / str(heads), format="compressed-tensors", names=names)
        made = safetensors.numpy.load_file(tmp_path / str(heads) / "model.safetensors")
        np.testing.assert_array_equal(made["q0.bias"], wanted[0].reshape(-1))
        assert len(made) == 1 + stacked
