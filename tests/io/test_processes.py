"""Several processes give the codes that one gives, write one set together, and say where they disagree."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import lcq
from lcq.forms.base import is_form
from lcq.io.file import load, read_index
from tests.io.part import rules, trained, weights

TIES = 0.01
"""Share of the codes that other orders of summation may change."""


def run(folder, count, devices, axes):
    """What each of so many processes found, each with so many devices."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    flags = re.sub(r"(device_count=)\d+", rf"\g<1>{devices}", os.environ["XLA_FLAGS"])
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [sys.executable, "-m", "tests.io.part", address]
    processes = []
    try:
        for rank in range(count):
            with open(folder / f"{rank}.txt", "wb") as said:
                processes.append(
                    subprocess.Popen(
                        [*command, str(rank), str(count), str(folder), axes],
                        env=environment, stdout=said, stderr=subprocess.STDOUT,
                    )
                )  # fmt: skip
        for rank, process in enumerate(processes):
            assert process.wait(timeout=300) == 0, (folder / f"{rank}.txt").read_text()[-3000:]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]


def codes_of(form):
    return [np.asarray(a) for a in jax.tree.leaves(form.unpack()) if a.dtype in (np.uint8, bool)]


@pytest.mark.filterwarnings("ignore:the weights are")
@pytest.mark.parametrize(("count", "devices", "axes"), [(2, 2, "Explicit"), (4, 1, "Auto")])
def test_processes_together(tmp_path, count, devices, axes):
    params, state = trained(jax.tree.map(jax.numpy.asarray, weights()), rules(count))
    forms = lcq.extract(state, params)
    lcq.save(tmp_path / "of-one.lcq", forms, max_shard_bytes=600)
    found = run(tmp_path, count, devices, axes)

    expected, made = lcq.table(forms, params).total, int(lcq.metrics(state)["c_steps"])
    one, many = tmp_path / "net.lcq", tmp_path / "set.lcq"
    held = read_index(many)
    assert all((tmp_path / shard).is_file() for shard in held.shards) and len(held.shards) >= count
    assert sorted(name for each in found for name in each["streams"]) == sorted(held.structs)
    for each in found:
        assert each["sizes"] == [one.stat().st_size, held.on_disk]
        assert each["streams"] and each["c_steps"] == made
        bits, coded, error = each["total"]
        assert bits == expected.bits
        np.testing.assert_allclose([coded, error], [expected.coded, expected.error], rtol=0.01)
    for back in (load(one, like=params), load(many, like=params)):
        leaves = (jax.tree.leaves(tree, is_leaf=is_form) for tree in (back, forms))
        for leaf, other in zip(*leaves, strict=True):
            if not is_form(other):
                np.testing.assert_allclose(leaf, other, rtol=1e-5, atol=1e-6)
                continue
            assert type(leaf) is type(other)
            np.testing.assert_allclose(leaf.dense(), other.dense(), rtol=2e-3, atol=2e-3)
            for a, b in zip(codes_of(leaf), codes_of(other), strict=True):
                assert (a != b).mean() <= TIES

    for rank, each in enumerate(found):
        assert each["of one"] == pytest.approx(float(forms["layers"][0]["w"].dense().sum()), rel=1e-5)
        assert each["alone"] == (tmp_path / "0.lcq").stat().st_size
        assert "expected the same rules in all" in each["rules"] and "KMeans(k=5" in each["rules"]
        assert "in process 1, number 1 of them; make them by the same code" in each["rules"]
        assert "expected the same leaves and settings of save in all" in each["trees"]
        assert "both/a: expected arrays that this process can read" in each["quantize"]
        words = "No space left" if rank == 1 else "process 1 could not write its part, so nothing was saved: "
        assert words in each["full"]
    names = {f"{rank}.{suffix}" for rank in range(count) for suffix in ("txt", "json")}
    names |= {"0.lcq", "net.lcq", "set.lcq", "of-one.lcq", *held.shards, *read_index(tmp_path / "of-one.lcq").shards}
    assert {each.name for each in tmp_path.iterdir()} == names
