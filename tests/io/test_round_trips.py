"""What goes out to other programs comes in again with the same codes, and out again as the same bytes."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

import lcq
from lcq.cli.main import main
from lcq.io import export, from_qwix, open_gguf, read, to_qwix
from lcq.schemes import Ternary, Uniform
from tests.io.checkpoints.gguf_bytes import field, gguf, random_blocks, text

W = np.random.default_rng(0).normal(size=(512, 32)).astype(np.float32)
half = functools.partial(Uniform, scale_dtype="float16")

CASES = [
    ("compressed-tensors", half(4, per=32), "exact"),
    ("compressed-tensors", half(3, per=32), "exact"),
    ("compressed-tensors", half(4, per=32, zero_point=True), "exact"),
    ("gptq", half(4, per=32), "exact"),
    ("gptq", half(8, per=64, zero_point=True), "exact"),
    ("gptq_v2", half(3, per=32, zero_point=True), "exact"),
    ("gguf", half(4, per=32), "exact"),
    ("gguf", half(5, per=32), "exact"),
    ("gguf", half(8, per=32), "exact"),
    ("gguf", Ternary(per=256, scale_dtype="float16"), "other levels"),
    ("gguf", half(4, per=32, zero_point=True), "zeros are minima"),
]


@pytest.mark.parametrize(("format", "scheme", "same"), CASES)
def test_out_and_in_and_out(tmp_path, format, scheme, same):
    forms = {"up": {"kernel": scheme.project(jnp.asarray(W))}}
    config = {"general.architecture": "llama"} if format == "gguf" else {"model_type": "mine"}
    first, second = (tmp_path / f"{name}{'.gguf' if format == 'gguf' else ''}" for name in ("first", "second"))
    export(forms, first, format=format, config=config)
    back = read(first, forms=True)
    form, given = back["up.weight"].unpack(), forms["up"]["kernel"]
    if same == "zeros are minima":
        minima = np.abs(np.asarray(given.scale, np.float32) * given.zero).max()
        np.testing.assert_allclose(form.dense(), given.dense().T, rtol=1e-3, atol=2**-11 * minima)  # of float16
    else:
        np.testing.assert_array_equal(form.dense().astype(np.float32), given.dense().T.astype(form.dtype))
        np.testing.assert_array_equal(np.asarray(form.scale, np.float32), np.asarray(given.scale, np.float32).T)
    if same == "exact":
        np.testing.assert_array_equal(form.codes, given.codes.T)
        assert (form.zero is None) == (given.zero is None)
    export(back, second, format=format, config=config)
    files = [p for p in ([first] if first.is_file() else first.iterdir()) if p.suffix in (".gguf", ".safetensors")]
    assert files
    for file in files:
        again = second if file == first else second / file.name
        assert again.read_bytes() == file.read_bytes()


@pytest.mark.parametrize("scheme", [Uniform(4, per=32), Uniform(8, per="channel"), Uniform(4, per=32, zero_point=True)])
def test_qwix(scheme):
    form = scheme.project(jnp.asarray(W))
    back = from_qwix(to_qwix({"up": {"kernel": form}}))["up"]["kernel"].unpack()
    np.testing.assert_array_equal(back.codes, form.codes)
    np.testing.assert_array_equal(np.asarray(back.dense(), np.float32), np.asarray(form.dense()).astype(back.dtype))


def test_a_file_of_llama_cpp_on_the_command_line(tmp_path, monkeypatch):
    """In, to .lcq, and out with the fields of the first: the same file."""
    monkeypatch.chdir(tmp_path)
    fields = field("general.architecture", 8, text("llama")) + field("llama.block_count", 4, b"\x01\0\0\0")
    tensors = {
        "a.weight": ((4, 64), 3, random_blocks("Q4_1", 8).tobytes()),
        "b.weight": ((2, 64), 8, random_blocks("Q8_0", 4).tobytes()),
        "norm.weight": ((3,), 0, W[0, :3].tobytes()),
    }
    data = gguf(tensors, fields, 2)
    (tmp_path / "net.gguf").write_bytes(data)
    assert main(["import", "net.gguf", "-o", "net.lcq"]) == 0
    assert main(["export", "net.lcq", "--to", "gguf", "--config", "net.gguf", "-o", "again.gguf"]) == 0
    assert (tmp_path / "again.gguf").read_bytes() == data
    assert list(open_gguf(tmp_path / "again.gguf").fields) == ["general.architecture", "llama.block_count"]
    assert isinstance(lcq.load("net.lcq")["a.weight"], lcq.forms.Codes)
