#!/usr/bin/env bash
# constriction reads what was written with float64 probabilities as other symbols if the same numbers are float32.
#
# Versions: constriction 0.5.0, numpy 2.4.6.
# Seen: 1,000 symbols and a row of probabilities for each, all of which float32 holds exactly, coded with
# `Categorical(perfect=False)`: the ANS and the range coder give the symbols back if both sides pass one type, and more
# than 500 others if one passes float32 and the other float64, in either direction and without an error.
# `perfect=True` and Gaussians are right.
# A table of probabilities that a net gave in float32 must not become float64 on the way to the reader, or back.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check constriction==0.5.0 numpy==2.4.6
"$work/venv/bin/python" - <<'PYTHON'
import importlib.metadata as m

import constriction
import numpy as np

model, queue, stack = (getattr(constriction.stream, name) for name in ("model", "queue", "stack"))
rng = np.random.default_rng(0)
narrow = rng.dirichlet(np.full(16, 0.3), 1000).astype(np.float32)
wide = narrow.astype(np.float64)
symbols = np.array([rng.choice(16, p=row / row.sum()) for row in wide], np.int32)


def wrong(kind, written, read):
    ans, ranges = stack.AnsCoder(), queue.RangeEncoder()
    ans.encode_reverse(symbols, kind, written)
    ranges.encode(symbols, kind, written)
    readers = stack.AnsCoder(ans.get_compressed()), queue.RangeDecoder(ranges.get_compressed())
    return [int((reader.decode(kind, read) != symbols).sum()) for reader in readers]


pairs = {"one type": (wide, wide), "float32 first": (narrow, wide), "float64 first": (wide, narrow)}
found, perfect = (
    {name: wrong(model.Categorical(perfect=exact), *pair) for name, pair in pairs.items()} for exact in (False, True)
)
print("constriction", m.version("constriction"), "wrong of 1,000 symbols, ANS and range coder:", found)
print("with perfect=True:", perfect)
assert found["one type"] == [0, 0] and min(found["float32 first"] + found["float64 first"]) > 500
assert all(counts == [0, 0] for counts in perfect.values())
PYTHON
