#!/usr/bin/env bash
# constriction reads rows of probabilities that lie in column order as if they lay in row order.
#
# Versions: constriction 0.5.0, numpy 2.4.6.
# Seen: 100 symbols coded with `Categorical` and one row of probabilities for each take 160 bits if the matrix is in C
# order and 224 if the same numbers are in Fortran order, as a transposed matrix is. What was written with the one and
# is read with the other comes back wrong, 81 of 100 symbols, from the range coder as from the ANS coder, without an
# error.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check constriction==0.5.0 numpy==2.4.6
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import importlib.metadata as m

import constriction
import numpy as np

model = constriction.stream.model.Categorical(perfect=False)
rows = np.array([[0.7, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 0.7]]).repeat(50, 0)
columns = np.asfortranarray(rows)
rng = np.random.default_rng(0)
symbols = np.array([rng.choice(4, p=p) for p in rows], np.int32)


def stack(written, read):
    coder = constriction.stream.stack.AnsCoder()
    coder.encode_reverse(symbols, model, written)
    back = constriction.stream.stack.AnsCoder(coder.get_compressed()).decode(model, read)
    return coder.num_bits(), int((back != symbols).sum())


def queue(written, read):
    coder = constriction.stream.queue.RangeEncoder()
    coder.encode(symbols, model, written)
    back = constriction.stream.queue.RangeDecoder(coder.get_compressed()).decode(model, read)
    return coder.num_bits(), int((back != symbols).sum())


assert np.array_equal(rows, columns)
pairs = (rows, rows), (columns, columns), (columns, rows)
same, other, mixed = ([coder(*pair) for coder in (stack, queue)] for pair in pairs)
back = [coder(rows, columns)[1] for coder in (stack, queue)]
print("constriction", m.version("constriction"), "bits and wrong symbols, ANS and range coder, in C order:", same)
print("in Fortran order:", other, "written in Fortran and read in C order:", mixed, "the reverse, wrong:", back)
assert [wrong for _, wrong in same] == [0, 0] and other[0][0] > 1.3 * same[0][0]
assert min(wrong for _, wrong in mixed) > 30 and min(back) > 30
PYTHON
