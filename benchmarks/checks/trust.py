"""What `lcq.load` does with files that are not what they should be, and `lcq.save` when it is killed.

    python -m benchmarks.checks.trust                    results/trust.json
    ... --files 2000 --kills 5 --dry              fewer, and no record

Files: a tree of every form, saved in both layouts, and of it, by turns and all from one seed,
    damaged   bytes changed, cut out, doubled or swapped, or the file cut short; its digests are as they were
    forged    its index, header or streams mutated, and every digest made right again
    random    bytes, or a right header before random bytes
Each goes through `load` with a limit of 1 MiB. Counted: refused with ArtifactError; loaded; anything else, which must
not be. A damaged file that loads must be the original tree. The memory that Python and numpy take is traced in each
load, the longest is timed.

Kills: a process saves two trees by turns to one path without end, and is killed (SIGKILL) after a random time; what is
then there must be one of the two, whole.
"""

import argparse
import copy
import hashlib
import json
import multiprocessing
import os
import random
import signal
import struct
import tempfile
import time
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lcq
from benchmarks.harness.record import record

LIMIT = 1 << 20
SLACK = 4 << 20
"""Memory beside what a file declares: its index parsed, the tree, the interpreter's own."""


def digest(data: bytes, size: int = 16) -> str:
    return hashlib.blake2b(data, digest_size=size).hexdigest()


def tree() -> dict[str, Any]:
    """Every form, in a few kilobytes."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(24, 16)), jnp.float32)
    schemes = {
        "codes": lcq.KMeans(3),
        "grid": lcq.Uniform(4, per="channel"),
        "binary": lcq.Binary(),
        "few": lcq.Prune(count=20),
        "some": lcq.Prune(fraction=0.3, values=lcq.KMeans(4)),
        "factors": lcq.LowRank(rank=2),
        "sum": lcq.Additive(lcq.KMeans(2), lcq.Prune(count=10)),
        "cast": lcq.Cast("bfloat16"),
    }
    whole = {name: w + i for i, name in enumerate(schemes)} | {"bias": jnp.arange(5.0), "step": 3, "none": None}
    return lcq.compress(whole, [lcq.Rule(name, scheme) for name, scheme in schemes.items()])


def damaged(data: bytes, rng: random.Random) -> bytes:
    a, b, c = sorted(rng.sample(range(len(data) + 1), 3))
    change = rng.randrange(6)
    if change == 0:
        return data[:a]
    if change == 1:
        return data[:a] + data[b:]
    if change == 2:
        return data[:b] + data[a:b] + data[b:]
    if change == 3:
        return data[:a] + data[b:c] + data[a:b] + data[c:]
    if change == 4:
        return data[:a] + rng.randbytes(min(b - a, 16)) + data[a + min(b - a, 16) :]
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def noise(data: bytes, rng: random.Random) -> bytes:
    kind = rng.randrange(3)
    if kind == 0:
        return rng.randbytes(rng.randrange(4096))
    if kind == 1:
        return struct.pack("<Q", rng.randrange(1 << rng.randrange(1, 64))) + rng.randbytes(rng.randrange(4096))
    header = 8 + struct.unpack("<Q", data[:8])[0]
    return data[:header] + rng.randbytes(len(data) - header)


HOSTILE = [None, True, -1, 0, 3, 2**31, 2**62, 10**30, 0.5, 1e308, "", "x", "bias", [], {}, "Codes", "U32", [2, 10**9]]


def forged(data: bytes, rng: random.Random) -> bytes:
    """Mutated where digests protect it, with right digests."""
    length = struct.unpack("<Q", data[:8])[0]
    header, streams = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    metadata = header.pop("__metadata__")
    coded = "coded" in metadata
    start = header["data"]["data_offsets"][0] if coded else 0
    index = json.loads(zlib.decompress(bytes(streams[:start]), -15) if coded else metadata["index"])
    if rng.random() < 0.5:  # what lies in a stream
        for _ in range(rng.randint(1, 8)):
            streams[rng.randrange(start, len(streams))] = rng.randrange(256)
    both = {"index": index} if coded else {"index": index, "header": header}
    for _ in range(rng.choice([0, 1, 1, 2])):
        both = mutated(both, rng)
    index, header = both.get("index"), both.get("header", header)
    if coded:
        return _coded(index, bytes(streams[start:]))
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        index["digests"][name] = digest(bytes(streams[begin:end]))
    return _sealed({**metadata, "index": json.dumps(index)}, header, bytes(streams))


def _coded(index: Any, data: bytes) -> bytes:
    begin = 0
    for stream in index["streams"]:
        stream[3] = digest(data[begin : begin + stream[2]], 8)
        begin += stream[2]
    deflate = zlib.compressobj(9, wbits=-15)
    raw = deflate.compress(json.dumps(index).encode()) + deflate.flush()
    cuts = {"index": (0, len(raw)), "data": (len(raw), len(raw) + len(data))}
    header = {k: {"dtype": "U8", "shape": [b - a], "data_offsets": [a, b]} for k, (a, b) in cuts.items()}
    return _sealed({"format": "lcq", "version": "3", "coded": digest(raw, 8)}, header, raw + data)


def _sealed(metadata: dict[str, Any], header: dict[str, Any], streams: bytes) -> bytes:
    raw = json.dumps({"__metadata__": metadata | {"digest": "0" * 32}} | header).encode()
    raw += b" " * (-len(raw) % 8)
    raw = raw.replace(b"0" * 32, digest(raw).encode())
    return struct.pack("<Q", len(raw)) + raw + streams


def mutated(root: Any, rng: random.Random) -> Any:
    """JSON with something replaced, dropped or doubled."""
    root = copy.deepcopy(root)
    everywhere = list(_places(root))[1:]
    place, other = rng.choice(everywhere), rng.choice(everywhere)
    node, source = root, root
    for key in place[:-1]:
        node = node[key]
    for key in other:
        source = source[key]
    action = rng.randrange(4)
    if action == 0 and len(place) > 1:
        del node[place[-1]]
    elif action == 1 and isinstance(node, list):
        node.append(copy.deepcopy(source))
    else:
        node[place[-1]] = copy.deepcopy(source) if action == 2 else rng.choice(HOSTILE)
    return root


def _places(node: Any, above: tuple[Any, ...] = ()) -> Any:
    yield above
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in items:
        yield from _places(child, (*above, key))


def equal(a: Any, b: Any) -> bool:
    same = jax.tree.structure(a) == jax.tree.structure(b)
    return same and all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def files(count: int, seed: int, folder: Path) -> dict[str, Any]:
    """Loads so many files; what became of them."""
    rng, path = random.Random(seed), folder / "net.lcq"
    whole = []
    for coded in (False, True):
        lcq.save(path, tree(), coded=coded)
        whole.append((path.read_bytes(), lcq.load(path)))
    makers: dict[str, Callable[[bytes, random.Random], bytes]] = {"damaged": damaged, "forged": forged, "random": noise}
    outcomes: Counter[str] = Counter()
    peak, longest = 0, 0.0
    tracemalloc.start()
    for i in range(count):
        data, original = whole[i % 2]
        kind = ("damaged", "forged", "forged", "random")[i // 2 % 4]
        try:
            changed = makers[kind](data, rng)
        except (KeyError, TypeError, IndexError, AttributeError, ValueError):
            changed, kind = damaged(data, rng), "damaged"  # a mutation after which no digest can be put in
        if changed == data:
            continue
        path.write_bytes(changed)
        tracemalloc.reset_peak()
        before, start = tracemalloc.get_traced_memory()[0], time.perf_counter()
        try:
            loaded = lcq.load(path, limit=LIMIT)
            outcome = "loaded" if kind == "forged" or equal(loaded, original) else "loaded wrong"
        except lcq.ArtifactError:
            outcome = "refused"
        except Exception as error:
            outcome = f"raised {type(error).__name__}: {error}"
        longest = max(longest, time.perf_counter() - start)
        peak = max(peak, tracemalloc.get_traced_memory()[1] - before)
        outcomes[f"{kind} {outcome}"] += 1
    tracemalloc.stop()
    return {
        "files": sum(outcomes.values()),
        "seed": seed,
        "outcomes": dict(sorted(outcomes.items())),
        "peak_bytes": peak,
        "limit": LIMIT,
        "longest_seconds": round(longest, 3),
    }


def _save_forever(path: str, trees: list[Any]) -> None:
    while True:
        for forms in trees:
            lcq.save(path, forms)


def kills(count: int, seed: int, folder: Path) -> dict[str, Any]:
    """Kills a process that saves, so many times; what it left."""
    rng, path = random.Random(seed), folder / "killed.lcq"
    context, left = multiprocessing.get_context("fork"), Counter[str]()
    trees = [{"w": lcq.KMeans(k).project(jnp.arange(300_000.0)).pack(), "k": k} for k in (2, 16)]
    for _ in range(count):
        process = context.Process(target=_save_forever, args=(str(path), trees))
        process.start()
        while not path.exists() and process.is_alive():
            time.sleep(0.01)
        time.sleep(rng.random())
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        left[f"whole, k = {int(lcq.load(path)['k'])}"] += 1
    return {"kills": count, "seed": seed, "left": dict(left), "temporaries": len(list(folder.glob("*.tmp")))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=200_000)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry", action="store_true", help="no record")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [kills(args.kills, args.seed, Path(folder)), files(args.files, args.seed, Path(folder))]
    print(json.dumps(rows, indent=1), flush=True)
    outcomes = rows[1]["outcomes"]
    bad = [name for name in outcomes if "wrong" in name or "raised" in name]
    if bad or rows[1]["peak_bytes"] > LIMIT + SLACK:
        raise SystemExit(f"expected ArtifactError alone, within the limit, got {bad or rows[1]['peak_bytes']}")
    if not args.dry:
        record("trust", rows, seeds=[args.seed])


if __name__ == "__main__":
    main()
