"""transformers loads a llama that lcq exports for vLLM: the logits of lcq."""

import dataclasses
import functools
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import lcq
from lcq.examples import llama, llama_names
from lcq.io import export

torch = pytest.importorskip("torch", reason="pip install '.[peers]', or run .ci/peers")
transformers = pytest.importorskip("transformers", reason="pip install '.[peers]', or run .ci/peers")
pytest.importorskip("compressed_tensors", reason="pip install '.[peers]', or run .ci/peers")

RNG = np.random.default_rng(0)
PROJECTIONS = r"model\.layers\..*_proj\.weight"


def made():
    """A llama of random weights, its head its own."""
    shapes = {"wq": (64, 64), "wk": (64, 32), "wv": (64, 32), "wo": (64, 64), "w1": (64, 96), "w3": (64, 96)}
    shapes |= {"w2": (96, 64)}
    layers = {name: RNG.normal(size=(2, *shape)) / 8 for name, shape in shapes.items()}
    layers |= {name: RNG.uniform(0.5, 1.5, (2, 64)) for name in ("attention_norm", "ffn_norm")}
    tree = {"tok_embeddings": RNG.normal(size=(50, 64)), "norm": np.ones(64), "output": RNG.normal(size=(64, 50)) / 8}
    tree = {k: v.astype(np.float32) for k, v in tree.items()}
    return tree | {"layers": {k: v.astype(np.float32) for k, v in layers.items()}}, llama_names.Config(4, 1e-5, 1e4)


def stories260k():
    arrays = np.load(Path(os.environ["LCQ_DATA"]) / "stories" / "stories260k_llama.npz")
    return llama_names.from_llama2c(arrays), llama_names.Config(8)


needs_data = pytest.mark.skipif(
    "LCQ_DATA" not in os.environ, reason="real data: set LCQ_DATA to the folder that holds it"
)


def loaded_logits(folder, tokens):
    """Of the net that transformers makes of a folder, all of which it uses."""
    net, told = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    with torch.no_grad():
        return net(torch.from_numpy(tokens).long()).logits.numpy()


@pytest.mark.parametrize("make", [made, pytest.param(stories260k, marks=needs_data)])
@pytest.mark.parametrize(("bits", "per"), [(2, 4), (3, 4), (4, 4), (5, "channel"), (8, "channel")])
def test_the_same_logits(make, bits, per, tmp_path):
    params, config = make()
    flat, said = llama_names.to_huggingface(params, config, 64)
    forms = lcq.compress(flat, [lcq.Rule(PROJECTIONS, lcq.Uniform(bits, per=per, scale_dtype="float32"), layout="oi")])
    export(forms, tmp_path / "net", format="compressed-tensors", config=said)
    tokens = RNG.integers(0, 50, (2, 12)).astype(np.int32)
    found = loaded_logits(tmp_path / "net", tokens)
    halves = functools.partial(llama.logits, config=dataclasses.replace(config, halves=True))
    expected = np.asarray(halves(lcq.decompress(forms), tokens))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    assert np.abs(found - np.asarray(llama.logits(params, jnp.asarray(tokens), config))).max() > 1e-3  # codes matter


@pytest.mark.parametrize("mixed", [False, True])
def test_layers_that_are_no_codes_are_ignored(mixed, tmp_path):
    """Some layers of a block dense, and if mixed those that are codes of two widths: all weights are lcq's."""
    params, config = made()
    flat, said = llama_names.to_huggingface(params, config, 64)
    wide, narrow = (lcq.Uniform(bits, per=16, scale_dtype="float32") for bits in (8 if mixed else 4, 4))
    rules = [lcq.Rule(r".*\.o_proj\.weight", wide, layout="oi")]
    rules += [lcq.Rule(r".*layers\.1\.mlp\.\w+\.weight", narrow, layout="oi")]
    forms = lcq.compress(flat, rules)
    export(forms, tmp_path / "net", format="compressed-tensors", config=said)
    tokens = RNG.integers(0, 50, (2, 12)).astype(np.int32)
    found = loaded_logits(tmp_path / "net", tokens)
    halves = functools.partial(llama.logits, config=dataclasses.replace(config, halves=True))
    expected = np.asarray(halves(lcq.decompress(forms), tokens))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    assert np.abs(found - np.asarray(halves(flat, tokens))).max() > 2e-2 * np.abs(expected).max()
