#!/usr/bin/env bash
# pcodec gives None back for an array without elements.
#
# Versions: pcodec 1.1.0, numpy 2.4.6.
# Seen: simple_compress of an empty float32 array makes a file, simple_decompress of it returns None instead of an
# array; of an array of one element it returns that array.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check pcodec==1.1.0 numpy==2.4.6
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import importlib.metadata as m

import numpy as np
from pcodec import ChunkConfig, standalone


def again(many):
    return standalone.simple_decompress(standalone.simple_compress(np.ones(many, "f4"), ChunkConfig()))


found = again(0), again(1)
print("pcodec", m.version("pcodec"), "empty:", found[0], "one element:", found[1])
assert found[0] is None and found[1].tolist() == [1]
PYTHON
