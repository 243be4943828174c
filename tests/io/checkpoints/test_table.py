"""The table of formats has what is read, and what it says of refusals happens."""

import json

import numpy as np
import pytest

import lcq
from lcq.io import CHECKPOINT_FORMATS
from lcq.io.checkpoints.gguf import BLOCKS, PLAIN
from lcq.io.checkpoints.quantized import _KINDS, _METHODS
from tests.io.checkpoints.gguf_bytes import gguf

ROWS = [facts for name in CHECKPOINT_FORMATS for facts in CHECKPOINT_FORMATS[name].facts()]


def row(start):
    (found,) = [facts for facts in ROWS if facts.file.startswith(start)]
    return " ".join(found)


def test_every_method_has_a_row():
    methods = {"compressed-tensors": "… by compressed-tensors", "gptq": "… by GPTQ", "fp8": "… by fp8"}
    assert set(_METHODS) == set(methods) and all(row(start) for start in methods.values())
    assert all(f"`{kind}`" in row("… by compressed-tensors") for kind in _KINDS)


def test_every_type_of_gguf_is_named():
    told = row("`.gguf`")
    assert ", ".join(block.name for block in BLOCKS.values()) in told
    assert len(PLAIN) == len(["F32", "F16", "BF16", "F64"]) + len(["I8", "I16", "I32", "I64"])


def nvfp4(folder):
    (folder / "net.gguf").write_bytes(gguf({"w": ((1, 64), 40, bytes(64))}))
    return folder / "net.gguf"


def archive(folder):
    (folder / "net.keras").write_bytes(b"PK")
    return folder / "net.keras"


def awq(folder):
    lcq.io.write(folder / "model.safetensors", {"x.qweight": np.ones((2, 2), np.int32)})
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "awq"}}))
    return folder


def torch(folder):
    (folder / "net.pt").write_bytes(b"PK")
    return folder / "net.pt"


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (nvfp4, "write it again in one of these"),
        (archive, "unzip model.weights.h5"),
        (awq, "read its tensors as they are, without forms"),
        (torch, "make one with safetensors"),
    ],
)
def test_refusals_say_what_to_do(tmp_path, make, complaint):
    with pytest.raises(ValueError, match=complaint):
        lcq.io.read(make(tmp_path), forms=True)
