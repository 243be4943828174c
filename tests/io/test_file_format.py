"""The page on the file format: the reader that it prints, which knows nothing of lcq, reads what lcq wrote."""

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import lcq
from lcq.forms import bitpack
from lcq.io import CODECS
from lcq.io.container import DTYPES, VERSION, VERSIONS
from lcq.io.file import each_leaf, read_index
from lcq.io.records import code_streams
from tests.io.test_index import STREAMS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/file_format.md").read_text()
GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def reader():
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(compile(block, "file_format.md", "exec"), names)
    return names


def streams_of(path):
    """Every stream as lcq reads it, codes apart."""
    found = {}
    for record, leaf in each_leaf(path):
        codes = code_streams(record, leaf.value)
        for name, (words, levels, count) in codes.items():
            found[name] = bitpack.unpack_host(words, bitpack.width(levels), count)
        if "array" in record:
            found[record["array"]] = leaf.value
    return found


@pytest.mark.parametrize("name", ["plain", "coded", "wide"])
def test_the_printed_reader_reads_golden_files(reader, name):
    path = GOLDEN / f"{name}.lcq"
    records, arrays = reader["read_streams"](path)
    assert records == read_index(path).records and arrays.keys() == read_index(path).structs.keys()
    compared = 0
    for stream, expected in streams_of(path).items():
        found = arrays[stream]
        if name == "plain" and found.dtype == np.uint32:
            continue  # of plain files codes are the words that a reader of safetensors gives
        np.testing.assert_array_equal(found, expected, err_msg=stream)
        compared += 1
    assert compared >= (2 if name == "plain" else 3)


@pytest.mark.parametrize("codecs", [["rans"], ["raw"]])
@pytest.mark.parametrize("levels", [2, 3, 200, 300])
def test_the_printed_reader_makes_codes_dense(reader, tmp_path, codecs, levels):
    w = np.repeat(np.random.default_rng(0).normal(size=levels).astype(np.float32), 7).reshape(7, -1)
    form = lcq.KMeans(levels).project(jnp.asarray(w))
    lcq.save(tmp_path / "net.lcq", {"w": form}, codecs=codecs)
    (record,), arrays = reader["read_streams"](tmp_path / "net.lcq")
    np.testing.assert_array_equal(reader["dense_of"](record, arrays), form.dense())


@pytest.mark.parametrize("name", STREAMS)
def test_the_printed_reader_decodes_golden_streams(reader, name):
    codes, levels, _ = STREAMS[name]
    found = reader["codes_of"]((GOLDEN / f"{name}.rans").read_bytes(), codes.size, levels)
    np.testing.assert_array_equal(found, codes)


def test_the_printed_reader_reads_sets(reader, tmp_path):
    tree = {f"w{i}": np.random.default_rng(i).normal(size=(8, 16)).astype(np.float32) for i in range(4)}
    forms = lcq.compress(tree, [lcq.Rule("w[0-2]", lcq.KMeans(4))])
    lcq.save(tmp_path / "one.lcq", forms)
    lcq.save(tmp_path / "net.lcq", forms, max_shard_bytes=500)
    records, arrays = reader["read_streams"](tmp_path / "net.lcq")
    expected, others = reader["read_streams"](tmp_path / "one.lcq")
    assert records == expected and arrays.keys() == others.keys() and len(list(tmp_path.iterdir())) > 3
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, others[name])


def test_the_printed_reader_sees_damage(reader, tmp_path):
    whole = (GOLDEN / "coded.lcq").read_bytes()
    for at in (200, 700, len(whole) - 1):
        (tmp_path / "net.lcq").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises((AssertionError, ValueError, KeyError)):
            reader["read_streams"](tmp_path / "net.lcq")


def test_the_page_names_what_there_is():
    rows = re.findall(r"^\| `?([\w.]+)`? \|", PAGE, re.MULTILINE)
    assert {"raw", "rans"} <= set(rows) and {"raw", "rans"} <= set(CODECS)
    assert [row for row in rows if row.isdigit()] == list(VERSIONS) and f"| `version` | `{VERSION}` |" in PAGE
    assert all(re.search(rf"\b{kind}\b", PAGE) for kind in DTYPES if kind[0] not in "IU")
