"""lcq export: names as typed, what is printed, what is refused, and the words of errors."""

import json

import numpy as np
import pytest
import safetensors.numpy

import lcq
from lcq.cli.export import parse_name
from lcq.cli.main import main
from lcq.io import Name
from tests.io.exports.made import codes, grid


def test_names_as_typed():
    typed = parse_name(r"layers/(.*)/kernel=blk.{0}.\1.weight; layout=io; stacked=1; heads=4; type=int8")
    assert typed == Name(r"layers/(.*)/kernel", r"blk.{0}.\1.weight", "io", 1, 4, "int8")
    assert parse_name("head=") == Name("head", None)
    for words in ("head", "=x", "a=b; joint", "a=b; stacked=x"):
        with pytest.raises(ValueError, match="expected"):
            parse_name(words)


@pytest.fixture
def net(tmp_path):
    four, _ = codes((64, 32), (2, 32), grid(-8, 7), scale="float32")
    table = lcq.forms.Codes(four.codes % 5, levels=np.float32([[[-2, -0.937, 0, 0.711, 2]]]))
    lcq.save(tmp_path / "net.lcq", {"up": {"kernel": four}, "b": np.ones(3, np.float32)})
    lcq.save(tmp_path / "table.lcq", {"w": table})
    return tmp_path


def test_a_folder_of_compressed_tensors(net, capsys):
    (net / "config.json").write_text(json.dumps({"model_type": "mine"}))
    command = ["export", str(net / "net.lcq"), "--to", "compressed-tensors", "-o", str(net / "out")]
    assert main([*command, "--config", str(net), "--name", "b=bias"]) == 0
    told = capsys.readouterr().out
    assert "int4 in groups of 32" in told and "exact" in told and "up.weight" in told
    assert json.loads((net / "out" / "config.json").read_text())["model_type"] == "mine"
    assert set(safetensors.numpy.load_file(net / "out" / "model.safetensors")) >= {"bias", "up.weight_packed"}
    assert main(command) == 1 and "already there" in capsys.readouterr().err
    assert main([*command, "--force"]) == 0


def test_what_is_rounded_is_shown(net, capsys):
    (net / "gguf.json").write_text(json.dumps({"general.architecture": "llama"}))
    command = ["export", str(net / "net.lcq"), "--to", "gguf", "-o", str(net / "net.gguf")]
    assert main([*command, "--config", str(net / "gguf.json")]) == 0
    told = capsys.readouterr().out
    assert "Q4_0 in groups of 32" in told and "scales to float16" in told
    assert (
        "does not know these names of a llama, " in told
        and "more; give --llama" in told
        and "tokenizer.json as --tokenizer" in told
    )


def test_a_tokenizer_goes_along(net, capsys):
    (net / "gguf.json").write_text(json.dumps({"general.architecture": "gpt2"}))
    pre = {"type": "ByteLevel", "use_regex": False}
    said = {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "pre_tokenizer": pre}
    (net / "tokenizer.json").write_text(json.dumps(said))
    command = ["export", str(net / "net.lcq"), "--to", "gguf", "-o", str(net / "net.gguf"), "--tokenizer", str(net)]
    assert main([*command, "--config", str(net / "gguf.json")]) == 1
    assert 'it: "tokenizer.ggml.pre": "NAME" in the JSON of --config' in capsys.readouterr().err
    (net / "gguf.json").write_text(json.dumps({"general.architecture": "gpt2", "tokenizer.ggml.pre": "mine"}))
    assert main([*command, "--config", str(net / "gguf.json")]) == 0
    fields = lcq.io.open_gguf(net / "net.gguf").fields
    assert fields["tokenizer.ggml.tokens"].value == ["a"] and "note" not in capsys.readouterr().out


def test_an_onnx_model_is_asked_for(net, capsys):
    assert main(["export", str(net / "net.lcq"), "--to", "onnx", "-o", str(net / "net.onnx")]) == 1
    assert "expected --config MODEL.onnx of the dense function" in capsys.readouterr().err


def test_errors_in_words_of_the_command(net, capsys):
    command = ["export", str(net / "table.lcq"), "--to", "gptq", "-o", str(net / "out")]
    assert main(command) == 1
    assert "of 3 bits moves its weights by" in (told := capsys.readouterr().err) and "say --nearest BITS" in told
    assert main([*command, "--nearest", "8"]) == 1
    assert "--name 'w=w.weight; layout=io'" in capsys.readouterr().err
    named = [*command, "--nearest", "8", "--name", "w=w.weight; layout=io"]
    assert main(named) == 0 and "a grid for 5 levels" in capsys.readouterr().out
    assert main([*command, "--llama", "--force"]) == 1 and "num_attention_heads" in capsys.readouterr().err
    assert main([*command, "--name", "w"]) == 2
    assert main(["export", str(net / "table.lcq"), "--to", "gguf", "-o", str(net / "net.gguf")]) == 1
    said = 'give --config a file of JSON, metadata by key, such as {"general.architecture": "llama", ..}'
    assert said in capsys.readouterr().err
