#!/usr/bin/env bash
# numcodecs' Quantize makes float16 numbers infinite that are of ordinary size.
#
# Versions: numcodecs 0.16.6, numpy 2.4.6.
# Seen: Quantize(digits=2, dtype="f2") of 600 is infinite, with 3 digits 64 is, with 4 digits 5: numbers are multiplied
# by the next power of two above 10^digits in float16, whose largest is 65,504. In float32 they come back within the
# digits. numpy warns of an overflow; the codec raises nothing.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numcodecs==0.16.6 numpy==2.4.6
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import importlib.metadata as m

import numcodecs
import numpy as np


def kept(digits, kind, numbers):
    return numcodecs.Quantize(digits, kind).encode(np.array(numbers, kind)).tolist()


two, three, four = kept(2, "f2", [500, 600]), kept(3, "f2", [63, 64]), kept(4, "f2", [3, 5])
wide = kept(2, "f4", [500, 600])
print("numcodecs", m.version("numcodecs"), "2, 3, 4 digits in float16:", two, three, four, "2 in float32:", wide)
assert two == [500, np.inf] and three == [63, np.inf] and four == [3, np.inf] and wide == [500, 600]
PYTHON
