#!/usr/bin/env bash
# zarr cannot be imported once zfpy is installed.
#
# Versions: zarr 3.1.6, numcodecs 0.16.6, zfpy 1.0.1.post0.
# Seen: `import zarr` works, and after `pip install zfpy` it raises ValueError: numcodecs, which zarr needs, makes integers of the
# parts of zfpy's version, and one of them is post0. No checkpoint can be opened until zfpy is gone.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check zarr==3.1.6 numcodecs==0.16.6
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import zarr

print("zarr", zarr.__version__, "is imported")
PYTHON
"$work/venv/bin/pip" install --quiet --disable-pip-version-check zfpy==1.0.1.post0
"$work/venv/bin/python" -W ignore - <<'PYTHON'
try:
    import zarr

    raise SystemExit(f"it is still imported: {zarr.__version__}")
except ValueError as error:
    print("after installing zfpy 1.0.1.post0:", error)
    assert "post0" in str(error)
PYTHON
