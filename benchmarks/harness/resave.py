"""Results say anew which bytes and sha256 the files of nets have; files may be saved again before.

    python -m benchmarks.harness.resave                          of all files that are here, as they are
    python -m benchmarks.harness.resave lenet300 resnet20        saves again those of results whose names begin so

Files are saved in the version that `lcq.save` writes today, plain ones plain and coded ones coded. What they hold stays
bit for bit, so all other figures do.
"""

import json
import subprocess
import sys

import jax
import safetensors

import lcq
from benchmarks.harness.artifacts import ARTIFACTS, FOLDER, named, refresh
from benchmarks.harness.record import RESULTS, as_text


def again(name: str) -> None:
    """One file."""
    path = ARTIFACTS / name
    before = lcq.load(path)
    with safetensors.safe_open(path, "numpy") as file:
        coded = set(file.keys()) == {"index", "data"}
    lcq.save(path.with_suffix(".tmp"), before, coded=coded)
    after = lcq.load(path.with_suffix(".tmp"))
    pair = map(jax.device_get, (before, after))
    same = jax.tree.map(lambda a, b: a.dtype == b.dtype and a.tobytes() == b.tobytes(), *pair)
    if not all(jax.tree.leaves(same)):
        raise ValueError(f"{path.name}: saved again it holds something else")
    path.with_suffix(".tmp").replace(path)


def main() -> None:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=FOLDER, capture_output=True, text=True, check=True).stdout
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        here = [run["artifact"] for run in named(result["rows"]) if (ARTIFACTS / run["artifact"]).exists()]
        if here and path.name.startswith(tuple(sys.argv[1:])):
            for name in here:
                again(name)
            result["made"]["saved_again"] = commit.strip()
        refresh(result["rows"])
        text = as_text(result)
        if text != path.read_text():
            path.write_text(text)
            print(path.name)


if __name__ == "__main__":
    main()
