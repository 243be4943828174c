"""How short the streams of lcq's entropy coder are, and how long coding takes, beside other coders.

    taskset -c 0 python -m benchmarks.micro.coder [rounds] [codes]        results/coder.json

Sources: 1e7 independent codes of four levels at 1.83 bits and of three at .59 bits; 1e7 codes of a Markov chain that
keeps its level or draws it anew from the first source, of 1.375 bits a code; a thousand codes of each source.

Of lcq: the default, and n codes a block on L lanes where settings are named; decoded by numpy, and to the device by JAX
with its program compiled. Bytes are those of the whole stream, table and states included. The excess is over the
empirical entropy H_n of disjoint blocks of n codes, those of the stream for lcq, and single codes for others. A
thousand codes are coded by lcq alone. Seconds are the least of all rounds, which go through all coders in turn; wall
and cpu. LZMA, zstandard and pcodec are given one code in each number, DeepCABAC signed numbers, the likeliest zero;
constriction gets the table of frequencies and is not charged for it.

Peers that are not installed have a row that says so. DeepCABAC is the coder of NNCodec, which comes by
    pip install --no-deps nncodec
"""

import importlib.metadata
import importlib.util
import lzma
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.harness.markdown import grid
from benchmarks.harness.record import record, stored
from lcq.io.entropy_coding import rans

ROUNDS, SIZE, SHORT, SEED = 3, 10_000_000, 1000, 0
PEERS = ("constriction", "zstandard", "pcodec", "nncodec")
SECONDS = ("encode_wall", "encode_cpu", "decode_wall", "decode_cpu")
KEPT = 0.5233


class Source(NamedTuple):
    """Codes of a source and the settings at which lcq codes them: n, L; None for the default."""

    name: str
    codes: np.ndarray
    levels: int
    settings: tuple[tuple[int | None, int | None], ...]


class Coder(NamedTuple):
    encode: Callable[[np.ndarray], Any]
    decode: Callable[[Any], np.ndarray]
    bytes: Callable[[Any], int] = len


def sources(size: int) -> list[Source]:
    rng = np.random.default_rng(SEED)
    four, three = entropic(4, 1.83), entropic(3, 0.59)
    fresh = rng.choice(4, size, p=four)
    since = np.maximum.accumulate(np.where(rng.random(size) < KEPT, 0, np.arange(size)))
    default = (None, None)
    return [
        Source("independent_1.83", rng.choice(4, size, p=four).astype(np.uint8), 4, (default, (1, 512), (2, 512))),
        Source("independent_0.59", rng.choice(3, size, p=three).astype(np.uint8), 3, (default, (3, 128), (4, 128))),
        Source("markov", fresh[since].astype(np.uint8), 4, (default, *((n, 256) for n in (1, 2, 3, 4)))),
    ]


def entropic(levels: int, bits: float) -> np.ndarray:
    """Chances proportional to exp(-a i) of given entropy in bits."""
    low, high = 0.0, 50.0
    for _ in range(100):
        rate = (low + high) / 2
        p = np.exp(-rate * np.arange(levels))
        p /= p.sum()
        low, high = (rate, high) if -(p * np.log2(p)).sum() > bits else (low, rate)
    return p


def ours(levels: int, size: int, n: int | None, lanes: int | None, device: bool) -> Coder:
    decode = rans.decode_on_device if device else rans.decode
    return Coder(
        lambda codes: rans.encode(codes, levels, block=n, lanes=lanes),
        lambda data: np.asarray(jax.block_until_ready(decode(data, size, levels))),
    )


def peers(source: Source) -> dict[str, Coder | None]:
    """Other coders by name, None for one that is not installed."""
    codes, size = source.codes, source.codes.size
    there = {name: importlib.util.find_spec(name) is not None for name in PEERS}
    found: dict[str, Coder | None] = {
        "lzma": Coder(
            lambda c: lzma.compress(c.tobytes(), preset=9), lambda d: np.frombuffer(lzma.decompress(d), np.uint8)
        )
    }
    if there["constriction"]:
        import constriction

        counts = np.bincount(codes, minlength=source.levels) / size
        model = constriction.stream.model.Categorical(counts.astype(np.float32), perfect=False)
        wide = codes.astype(np.int32)

        def put(_: np.ndarray) -> Any:
            coder = constriction.stream.stack.AnsCoder()
            coder.encode_reverse(wide, model)
            return coder.get_compressed()

        found["constriction"] = Coder(
            put, lambda d: constriction.stream.stack.AnsCoder(d).decode(model, size), lambda d: d.nbytes
        )
    if there["zstandard"]:
        import zstandard

        found["zstandard_19"] = Coder(
            zstandard.ZstdCompressor(level=19).compress,
            lambda d: np.frombuffer(zstandard.ZstdDecompressor().decompress(d), np.uint8),
        )
    if there["pcodec"]:
        from pcodec import ChunkConfig, standalone

        narrow = codes.astype(np.uint16)  # its narrowest
        found["pcodec"] = Coder(
            lambda _: standalone.simple_compress(narrow, ChunkConfig()), lambda d: standalone.simple_decompress(d)
        )
    if there["nncodec"]:
        folder = importlib.util.find_spec("nncodec").submodule_search_locations[0]
        sys.path.append(f"{folder}/extensions")  # the package itself imports much that its coder does not need
        import deepCABAC

        signed = np.array([0, 1, -1, 2], np.int32)
        rows = signed[codes].reshape(1000, -1)
        off = (deepCABAC.HdspMode.AlwaysOff, np.zeros(2, np.int8))

        def put_cabac(_: np.ndarray) -> Any:
            coder = deepCABAC.Encoder()
            coder.initCtxModels(10, 0)
            coder.encodeLayer(rows, 0, 0, 0, 0, 0, np.zeros(rows.shape[0], np.int32), *off, 0, 0)
            return coder.finish()

        def take_cabac(data: Any) -> np.ndarray:
            coder, out = deepCABAC.Decoder(), np.zeros_like(rows)
            coder.setStream(data)
            coder.initCtxModels(10)
            coder.decodeLayer(out, 0, 0, 0, 0, *off, 0, 0)
            return np.array([0, 1, 3, 2], np.uint8)[out.reshape(-1)]  # -1 is the last

        found["deepcabac"] = Coder(put_cabac, take_cabac)
    missing = {"constriction": "constriction", "zstandard": "zstandard_19", "pcodec": "pcodec", "nncodec": "deepcabac"}
    return found | {label: None for name, label in missing.items() if not there[name]}


def timed(run: Callable[[], Any]) -> tuple[float, float, Any]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    return time.perf_counter() - wall, time.process_time() - cpu, result


def measure(source: Source, rounds: int) -> list[dict[str, Any]]:
    size = source.codes.size
    coders: dict[tuple[str, int | None, int | None], Coder | None] = {}
    for n, lanes in source.settings:
        coders["lcq_numpy", n, lanes] = ours(source.levels, size, n, lanes, False)
        coders["lcq_jax", n, lanes] = ours(source.levels, size, n, lanes, True)
    coders |= {(name, None, None): coder for name, coder in peers(source).items()}
    spent: dict[Any, list[tuple[float, ...]]] = {key: [] for key in coders}
    rows = {}
    for i in range(rounds):
        for key, coder in coders.items():
            row = {"source": source.name, "codes": size, "coder": key[0], "block": key[1], "lanes": key[2]}
            if coder is None:
                rows[key] = row | {"note": "not installed"}
                continue
            encoding = timed(lambda coder=coder: coder.encode(source.codes))
            if not i and key[0] == "lcq_jax":
                coder.decode(encoding[2])
            decoding = timed(lambda coder=coder, data=encoding[2]: coder.decode(data))
            np.testing.assert_array_equal(decoding[2], source.codes)
            spent[key].append((*encoding[:2], *decoding[:2]))
            best = dict(zip(SECONDS, map(min, zip(*spent[key], strict=True)), strict=True))
            length = coder.bytes(encoding[2])
            n = encoding[2][0] if key[0].startswith("lcq") else 1
            rows[key] = row | sizes(source, length, n or 1) | best
    constriction = rows.get(("constriction", None, None), {})
    for row in rows.values():
        if row["coder"] == "lcq_jax" and "decode_cpu" in constriction:
            row["decodes_as_fast_as_constriction_times"] = constriction["decode_cpu"] / row["decode_cpu"]
    return list(rows.values())


def sizes(source: Source, length: int, n: int) -> dict[str, Any]:
    size = source.codes.size
    bound = rans.entropy(source.codes, source.levels, n)
    return {
        "bytes": length,
        "bits_per_code": 8 * length / size,
        "block_of_stream": n,
        "entropy_of_blocks": bound,
        "excess": 8 * length / size / bound - 1,
        "bytes_over": length - bound * size / 8,
    }


def short(source: Source) -> dict[str, Any]:
    """The worst of all runs of a thousand codes in the first 1e5: bytes over single-code entropy."""
    runs = source.codes[:100_000].reshape(-1, SHORT)
    parts = [source._replace(codes=run) for run in runs]
    over = [sizes(part, len(rans.encode(part.codes, part.levels)), 1)["bytes_over"] for part in parts]
    row = {"source": source.name, "codes": SHORT, "coder": "lcq_numpy", "samples": len(runs)}
    return row | {"bytes_over_most": max(over), "bytes_over_mean": float(np.mean(over))}


SOURCES = {"independent_1.83": "independent", "independent_0.59": "independent", "markov": "a Markov chain"}
COLUMNS = {"lzma": "LZMA", "zstandard_19": "zstd -19", "deepcabac": "DeepCABAC", "constriction": "constriction"}


def table() -> str:
    """Bits a code of 1e7 codes, lcq's setting by setting beside other coders, and decoding."""
    long = [row for row in stored("coder") if row["codes"] > 1000 and "bytes" in row]
    bits = {(row["source"], row["coder"]): f"{row['bits_per_code']:.3f}" for row in long}
    rows = []
    for row in long:
        if row["coder"] == "lcq_jax" and not (row["source"] == "independent_0.59" and row["lanes"] == 128):
            chosen = "" if row["lanes"] is None else f", {row['lanes']} lanes"
            own = [f"{row['bits_per_code']:.4f}", f"{100 * row['excess']:.3f} %", f"{row['decode_cpu']:.3f}"]
            times = f"{row['decodes_as_fast_as_constriction_times']:.1f}"
            peers = [bits.get((row["source"], peer), "") for peer in COLUMNS]
            rows.append([f"{SOURCES[row['source']]}: n = {row['block_of_stream']}{chosen}", *own, times, *peers])
    head = ["bits a code", "lcq", "over H_n", "decoded, cpu s", "constriction's over it", *COLUMNS.values()]
    return grid(head, rows)


if __name__ == "__main__":
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    size = int(sys.argv[2]) if len(sys.argv) > 2 else SIZE
    rows = []
    for source in sources(size):
        rows += [*measure(source, rounds), short(source)]
    for row in rows:
        print({key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in row.items()})
    found = {name: importlib.metadata.version(name) for name in PEERS if importlib.util.find_spec(name)}
    record("coder", rows, seeds=[SEED], rounds=rounds, size=size, peers=found, cores_used=len(os.sched_getaffinity(0)))
