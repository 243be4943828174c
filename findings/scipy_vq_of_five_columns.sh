#!/usr/bin/env bash
# scipy.cluster.vq finds the nearest code of float32 vectors of four numbers, and of five another.
#
# Versions: scipy 1.17.1, numpy 2.4.6.
# Seen: of vectors near 1 with a spread of .0003, as the gains of a norm are, vq gives every one of four columns its
# nearest code, and three quarters of those of five or more a wrong one, with distances that are too small by three
# quarters; the same numbers in float64 are right. From five columns on it multiplies out the squares, in the type of
# the input. kmeans and kmeans2 use it: their codebooks of 16 lose a fifth to a third more than those of float64.
# A codebook of groups of weights around a common value is worse than it should be: center them, or use float64.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check scipy==1.17.1 numpy==2.4.6
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import importlib.metadata as m

import numpy as np
from scipy.cluster.vq import kmeans, kmeans2, vq

gains = (1 + 0.0003 * np.random.default_rng(0).normal(size=(4000, 8))).astype(np.float32)


def squares(rows, book):
    return ((rows[:, None].astype(np.float64) - book) ** 2).sum(-1)


def wrong(columns, kind):
    rows = gains[:, :columns].astype(kind)
    codes, distances = vq(rows, rows[:16])
    right = squares(rows, rows[:16])
    ratio = distances.mean() / np.sqrt(right.min(1)).mean()
    return round(float((codes != right.argmin(1)).mean()), 3), round(float(ratio), 2)


def more(find):
    losses = [squares(gains, find(gains.astype(kind))).min(1).mean() for kind in (np.float32, np.float64)]
    return round(float(losses[0] / losses[1]), 2)


found = {columns: [wrong(columns, kind) for kind in (np.float32, np.float64)] for columns in (4, 5, 8)}
books = more(lambda x: kmeans(x, 16, seed=0)[0]), more(lambda x: kmeans2(x, 16, minit="points", seed=1)[0])
print("scipy", m.version("scipy"), "share of wrong codes and distance over the right one, float32 and float64:", found)
print("loss of kmeans and kmeans2 in float32 over that in float64:", books)
assert found[4][0] == (0, 1) and all(found[columns][1] == (0, 1) for columns in found)
assert all(found[columns][0][0] > 0.5 and found[columns][0][1] < 0.5 for columns in (5, 8)) and min(books) > 1.1
PYTHON
