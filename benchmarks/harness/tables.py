"""The README's tables, from the committed results.

python -m benchmarks.harness.tables        writes them between their markers in README.md
"""

import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness.record import FOLDER, RESULTS, stored

README = FOLDER.parent / "README.md"
BLOCK = r"(<!-- table: {} -->\n).*?(<!-- end -->)"


def grid(head: list[str], rows: list[list[str]]) -> str:
    """A markdown table; the first column is text, the others numbers."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows)) + "\n"


LENET = {
    "reference": ("float32 (given)", ""),
    "dc_k2": ("1 bit: direct compression", ""),
    "idc_k2": ("1 bit: iterated direct compression", ""),
    "ste_k2": ("1 bit: straight-through", ""),
    "lc_k2": ("1 bit: **LC**", "loss .029 / .024"),
    "lc_k2_adam": ("1 bit: **LC**, Adam", ""),
    "lc_k2_proximal": ("1 bit: **LC**, proximal", ""),
    "lc_k2_slow": ("1 bit: **LC**, slow", "error 2.3 / 2.13"),
    "lc_k2_slowest": ("1 bit: **LC**, slower", "error 2.3 / 2.13"),
    "lc_k2_teacher": ("1 bit: **LC**, slow, teacher", "error 2.3 / 2.13"),
    "lc_k2_teacher_slowest": ("1 bit: **LC**, slower, teacher", "error 2.3 / 2.13"),
    "dc_ternary": ("scaled ternary: direct compression", ""),
    "lc_ternary": ("scaled ternary: **LC**", "loss .0058 / .0045"),
    "dc_k4": ("2 bits: direct compression", ""),
    "lc_k4_slow": ("2 bits: **LC**, slow", "error 2.13 / 2.0"),
    "lc_k4_slow_0.2": ("2 bits: **LC**, slow, rate .2", "error 2.13 / 2.0"),
    "lc_k4_teacher": ("2 bits: **LC**, slow, rate .2, teacher", "error 2.13 / 2.0"),
    "lc_k4_teacher_0.09": ("2 bits: **LC**, slow, teacher", "error 2.13 / 2.0"),
}


def lenet300() -> str:
    """Medians over the seeds."""
    by_name = {row["recipe"]: row for name in LENET for row in stored(f"lenet300_{name}")}
    rows = []
    for name, (title, target) in LENET.items():
        if name not in by_name:
            continue
        run, median = by_name[name]["runs"][0], by_name[name]["median"]
        gap = f"{median['gap']:.1e}" if name.startswith("lc") else ""
        rows.append(
            [
                title,
                str(run["epochs"]),
                f"{median['train_loss']:.4f}",
                f"{median['test_error']:.2f}",
                gap,
                f"{median['bytes']:,}",
                f"{median['ratio']:.2f}",
                target,
            ]
        )
    return grid(
        ["LeNet300, MNIST", "epochs", "train loss", "test error %", "gap", "bytes", "ratio", "accept / aim"], rows
    )


TOOLKIT = {
    "K = 2 for each kernel": ("lc_k2_slowest", 2.56),
    "K = 2 for the first and the last": ("lc_k2_first_last_slow", 2.26),
    "5 % kept of all": ("lc_l0_5_slow", 2.18),
    "one codebook, K = 2, and 1 % corrections": ("lc_k2_l0_1_slow", 2.17),
    "5,000 kept; rank 10; K = 2": ("lc_mixed_slow", 2.13),
    "the same, rate .2": ("lc_mixed_slow_0.2", 2.13),
    "the same, teacher": ("lc_mixed_teacher", 2.13),
    "rank selection, 1e-6 a number": ("lc_rank_slow", 1.90),
    "rank selection, 3e-6": ("lc_rank_slow_3e-6", 1.90),
    "rank selection, 3e-7": ("lc_rank_slow_3e-7", 1.90),
    "rank selection, 1e-6, teacher": ("lc_rank_teacher", 1.90),
}


def lenet300_toolkit() -> str:
    """LC beside what the LC toolkit states, medians over the seeds."""
    rows = []
    for title, (name, stated) in TOOLKIT.items():
        for recipe in stored(f"lenet300_{name}"):
            median, seeds = recipe["median"], len(recipe["runs"])
            numbers = [f"{median['train_loss']:.4f}", f"{median['test_error']:.2f}", f"{stated:.2f}"]
            rows.append([title, *numbers, f"{median['bytes']:,}", f"{median['ratio']:.2f}", str(seeds)])
    return grid(["LeNet300, LC", "train loss", "test error %", "toolkit", "bytes", "ratio", "seeds"], rows)


def lenet300_kept() -> str:
    """Pruning of all kernels together, by method."""
    methods = {"dc": "direct", "idc": "iterated direct", "ste": "straight-through", "lc": "**LC**"}
    rows = []
    for percent in (10, 5, 3, 2, 1):
        found = {m: row["median"] for m in methods for row in stored(f"lenet300_{m}_l0_{percent}")}
        errors = [f"{found[m]['test_error']:.2f}" if m in found else "" for m in methods]
        last = found.get("lc", {})
        loss, gap = (f"{last['train_loss']:.4f}", f"{last['gap']:.0e}") if last else ("", "")
        target = "loss .00304 / .0025, error 2.1 / 1.9" if percent == 5 else ""
        rows.append([f"{percent} %", *errors, loss, gap, f"{last['ratio']:.1f}" if last else "", target])
    head = ["kept", *(f"{name}, error %" for name in methods.values()), "LC's loss", "gap", "ratio", "accept / aim"]
    return grid(head, rows)


RESNET = {
    "k2": ("1 bit, K = 2", "88.0 / 90.7"),
    "k4": ("2 bits, K = 4", "91.2 / 91.6"),
    "ternary": ("scaled ternary", ""),
    "mixed": ("mixed, 1.3 bits", "above the line, 88.0"),
    "prune10": ("10 % kept of all", "90.8 / 91.4"),
}
ATTEMPTS = {
    "lc_{}": "**LC**",
    "lc_{}_steep": "**LC**, steeper",
    "lc_{}_tuned": "**LC**, mask fixed for the last 6 epochs",
    "lc_{}_taught": "**LC**, as above, teacher and weight decay",
    "ste_{}": "straight-through",
}


def resnet20() -> str:
    """LC and straight-through training at the same epochs."""
    rows = []
    for name, (title, target) in RESNET.items():
        for recipe, method in ATTEMPTS.items():
            for row in stored(f"resnet20_{recipe.format(name)}"):
                size = [str(row["epochs"]), f"{row['bytes']:,}", f"{row['ratio']:.1f}"]
                gap = f"{row['gap']:.0e}" if row["gap"] is not None else ""
                scores = [f"{row['train_accuracy']:.2f}", f"{row['accuracy']:.2f}", gap]
                rows.append([f"{title}: {method}", *scores, *size, target if "LC" in method else ""])
    return grid(["ResNet-20, CIFAR-10", "train %", "test %", "gap", "epochs", "bytes", "ratio", "accept / aim"], rows)


def tune() -> str:
    """What recalibrating batch norm and tuning add."""
    rows = []
    for path in sorted(RESULTS.glob("tune_lenet300_*.json")):
        (row,) = stored(path.stem)
        name = row["name"].removeprefix("lenet300_")
        numbers = [f"{row['train_loss_before']:.4f}", f"{row['train_loss']:.4f}"]
        rows.append(
            [f"LeNet300, `{name}`", *numbers, f"{row['test_error_before']:.2f}", "", f"{row['test_error']:.2f}"]
        )
    for path in sorted(RESULTS.glob("tune_resnet20_*.json")):
        (row,) = stored(path.stem)
        errors = [f"{100 - row[k]:.2f}" for k in ("accuracy_as_it_is", "accuracy_recalibrated", "accuracy")]
        rows.append([f"ResNet-20, `{row['name'].removeprefix('resnet20_')}`", "", "", *errors])
    head = ["", "train loss before", "tuned", "test error % before", "batch norm recalibrated", "tuned"]
    return grid(head, rows)


def cstep() -> str:
    """Times in units of one `jnp.sort` of the same array."""
    by_kind: dict[str, list[Any]] = {}
    for row in stored("cstep"):
        by_kind.setdefault(row["what"], []).append(row)
    sort, cold, warm = (by_kind[kind][0] for kind in ("sort", "cold", "warm"))
    exact = max(row["cpu_seconds"] for row in by_kind["exact"])
    excess = max(row["excess_of_cold"] for row in by_kind["exact"])
    constants = max(abs(row["exact"] / row["constant"] - 1) for row in by_kind["lloyd_max"])
    plus = max(row["cold_over_best"] for row in by_kind["kmeans_plus_plus"])
    rows = [
        ["`jnp.sort`, 1e6 weights", f"{1e3 * sort['seconds']:.0f} ms", ""],
        ["cold, K = 16, in jit", f"{cold['of_a_sort']:.3f} of a sort", ".5 / .2"],
        ["warm, K = 16, in jit", f"{warm['of_a_sort']:.3f} of a sort", ".1 / .05"],
        ["memory, cold / warm", f"{cold['copies_of_the_leaf']:.2f} / {warm['copies_of_the_leaf']:.2f} leaves", "4"],
        ["exact, K = 16", f"{exact:.1f} cpu s at most", "10 / 2 s"],
        ["cold above the exact optimum", f"{100 * excess:.2f} %", ".1 %"],
        ["exact from the Lloyd-Max constants", f"{100 * constants:.2f} %", ".1 %"],
        ["K = 256, n = 1e5, over best of 5 k-means++", f"{plus:.3f} at most", "1"],
    ]
    for row in by_kind.get("kernels", []):
        what = f"{row['net'].split('_')[0]}, K = {row['k']}: cold above the exact optimum at worst, of {row['count']}"
        rows.append([what, f"{100 * row['excess']:.3f} %", ".2 / .05 %"])
    return grid(["K-means", "measured", "accept / aim"], rows)


def lc_overhead() -> str:
    rows = [
        [
            f"`{row['scheme']}`",
            *(f"{row['steps'][kind]['wrapped']['ratio']:.3f}" for kind in ("calls", "scan")),
            *(f"{row['steps'][kind]['bare again']['ratio']:.3f}" for kind in ("calls", "scan")),
            f"{row['state_over_weights']:.2f}",
            f"{row['c_step_temporary_over_largest_leaf']:.2f}",
        ]
        for row in stored("lc_overhead")
    ]
    head = ["LeNet300, batch 256", "step over bare: calls", "scan", "noise: calls", "scan"]
    return grid([*head, "state / weights", "C step's memory / leaf"], rows)


def brute_force() -> str:
    groups: dict[tuple[str, int], list[Any]] = {}
    for row in stored("brute_force"):
        groups.setdefault((row["problem"], row["weights"]), []).append(row)
    rows = []
    for (problem, weights), members in groups.items():
        hits = sum(row["starts_at_the_optimum"] for row in members)
        starts = sum(row["starts"] for row in members)
        worst = max(row["lc_median"] / row["optimum"] - 1 for row in members)
        direct = max(row["direct_compression"] / row["optimum"] - 1 for row in members)
        found = sum(row["starts_at_the_optimum"] > 0 for row in members)
        rows.append(
            [
                f"{problem}, {weights} weights",
                f"{hits} of {starts}",
                f"{found} of {len(members)}",
                f"{100 * worst:.1f} %",
                f"{100 * direct:.0f} %",
            ]
        )
    head = ["K = 2", "starts at the optimum", "problems solved", "LC's median above it, at worst", "direct compression"]
    return grid(head, rows)


IMAGES = {"mnist": "MNIST 784-500-300-10", "cifar": "CIFAR-10 CNN", "resnet20": "ResNet-20, CIFAR-10"}
METHODS = ("nearest", "paper", "gptq", "gpfq", "qronos", "descent")
IMAGE_TARGETS = {
    ("mnist", 3): (-0.43, -0.3),
    ("cifar", 16): (-0.17, -0.1),
    ("cifar", 8): (-1.06, -0.7),
    ("cifar", 4): (-4.4, -3.0),
    ("cifar", 3): (-7.0, -5.0),
    ("resnet20", 16): (91.61, 91.8),
    ("resnet20", 8): (91.21, 91.5),
    ("resnet20", 4): (89.30, 90.3),
    ("resnet20", 3): (88.95, 89.8),
}
"""Accept and aim, in percent right; negative numbers are from the float net."""


def gpfq_images() -> str:
    """Test accuracies; a row for each net and number of levels."""
    rows = []
    for (net, levels), targets in IMAGE_TARGETS.items():
        by_method = {row["recipe"].split("-")[0]: row for row in stored(f"gpfq_{net}") if row["levels"] == levels}
        before = next(iter(by_method.values()))["float_accuracy"]
        cells = [f"{by_method[m]['accuracy']:.2f}" if m in by_method else "" for m in METHODS]
        accept, aim = (t if t > 0 else before + t for t in targets)
        rows.append([f"{IMAGES[net]}, {levels} levels", f"{before:.2f}", *cells, f"{accept:.2f} / {aim:.2f}"])
    head = ["test accuracy %", "float", "nearest", "GPFQ, paper's levels", "GPTQ", "GPFQ", "Qronos", "`descent`"]
    return grid([*head, "accept / aim"], rows)


TEXT = (
    ("stories", "stories260K, nats", "nll", {4: "+.01", 3: "+.06"}),
    ("minilm", "MiniLM, STS-B Spearman", "spearman", {4: "-.003", 3: "-.015"}),
    ("minilm", "MiniLM, 1 - cosine to float", "turn", {4: "", 3: ""}),
)
TEXT_METHODS = ("qwix", "qwix_gptq", "nearest", "gptq", "gpfq", "qronos", "descent")


def gpfq_transformers() -> str:
    """Evaluation figures; a row for each net, number of bits, and what shares a scale."""
    rows = []
    for net, title, metric, targets in TEXT:
        by_key = {(row["bits"], row["per"], row["method"]): row for row in stored(f"gpfq_{net}")}
        digits = 3 if metric == "nll" else 4
        before = next(row[metric] for row in by_key.values() if row["method"] == "float")
        for bits, target in targets.items():
            for per in ("channel", "groups"):
                found = [by_key.get((bits, per, m)) for m in TEXT_METHODS]
                cells = ["" if row is None else f"{row[metric]:.{digits}f}" for row in found]
                rows.append([f"{title}, {bits} bits, {per}", f"{before:.{digits}f}", *cells, target])
    head = ["", "float", "qwix", "qwix GPTQ", "nearest", "GPTQ", "GPFQ", "Qronos", "`descent`", "accept"]
    return grid(head, rows)


def gpfq_speed() -> str:
    by_what = {(row["what"], row["inputs"]): row for row in stored("gpfq_speed")}
    gpfq, recursion = by_what["gpfq", 1024], by_what["recursion", 4096]
    compiled = [row["seconds"] for row in by_what.values() if row["what"] == "compilation"]
    walks = [row["walk_in_forward_passes"] for row in stored("gpfq_walk")]
    new = [row["compilations"] for row in stored("gpfq_walk")[1:]]
    rows = [
        [
            "N = n = 1024, m = 4096, over [N, m] [m, N] products",
            f"{gpfq['of_rate_of_wide']:.2f} of their rate",
            ".7 / .9",
        ],
        ["the same over [N, N] [N, n] products", f"{gpfq['of_rate_of_square']:.2f} of their rate", ".7 / .9"],
        ["the same, in seconds", f"{gpfq['seconds']:.2f}", ""],
        ["over the literal recursion as a scan", f"{gpfq['follow_over_this']:.1f} times", "4 / 5"],
    ]
    if peer := by_what.get(("brevitas", 1024)):
        same = f"{100 * peer['codes_as_ours']:.2f} % equal codes"
        rows.append([f"over Brevitas' GPFQ ({same})", f"{peer['over_gpfq']:.1f} times", "30"])
    rows += [
        ["N = 4096, n = 1024, recursion", f"{recursion['of_rate_of_large']:.2f} of the matmul rate", ".4 / .6"],
        ["compilation, N = 256, 1024, 4096", ", ".join(f"{s:.1f}" for s in compiled) + " s", "3 s"],
        ["walk over ResNet-20, in forward passes", ", ".join(f"{w:.1f}" for w in walks), "3"],
        ["its compilations for further numbers of batches", ", ".join(map(str, new)), "0"],
    ]
    return grid(["GPFQ", "measured", "accept / aim"], rows)


SIGNS = {
    (1, 4096, 4096): "15 / 25",
    (256, 1024, 1024): "8 / 10; 14 / 18",
    (256, 4096, 4096): "8 / 10; 14 / 18",
}
WEIGHTS = {"1 bit, learned": "4 / 15", "ternary": "4 / 8", "uniform 4 bits": "4 / 8", "codebook of 16": ""}


def kernels() -> str:
    """How many times faster than float32: one and two cores, both vector widths."""
    rows = stored("kernels") + stored("kernels_kept")
    runs = list(dict.fromkeys((row["cores"], row["vector_bits"]) for row in rows))
    lines: dict[tuple[str, str], dict[Any, str]] = {}
    for row in rows:
        m, *rest = row["shape"]
        for name, times in row["times"].items():
            if row["kind"] == "signs":
                if "packing" in name:
                    continue
                label = f"{name}: {m} x {rest[0]} x {rest[1]}", SIGNS.get(tuple(row["shape"]), "1")
            elif row["kind"] in ("weights", "kept weights"):
                if m not in (1, 64):
                    continue
                target = WEIGHTS.get(name, "") if m == 1 else ".9"
                label = f"{name}: {m} x {rest[0]} x {rest[1]}", target if row["kind"] == "weights" else ""
            elif row["kind"].endswith("convolution"):
                label = f"{row['kind']} 256 to 256, 28 x 28, batch of {m}, packing included", "6 / 8"
            else:
                label = f"{row['kind']}, batch of {m}: {name}", ""
            lines.setdefault(label, {})[row["cores"], row["vector_bits"]] = f"{times:.{1 + (times < 2)}f}"
    head = ["times faster than float32", *(f"{c} core{'s' * (c > 1)}, {v} bits" for c, v in runs), "accept / aim"]
    cells = [[name, *(found.get(run, "") for run in runs), target] for (name, target), found in lines.items()]
    return grid(head, cells)


SOURCES = {"independent_1.83": "independent", "independent_0.59": "independent", "markov": "a Markov chain"}
CODER_PEERS = {"lzma": "LZMA", "zstandard_19": "zstd -19", "deepcabac": "DeepCABAC", "constriction": "constriction"}


def coder() -> str:
    """Bits a code of 1e7 codes, lcq's setting by setting beside other coders, and decoding."""
    long = [row for row in stored("coder") if row["codes"] > 1000 and "bytes" in row]
    bits = {(row["source"], row["coder"]): f"{row['bits_per_code']:.3f}" for row in long}
    rows = []
    for row in long:
        if row["coder"] == "lcq_jax" and not (row["source"] == "independent_0.59" and row["lanes"] == 128):
            chosen = "" if row["lanes"] is None else f", {row['lanes']} lanes"
            own = [f"{row['bits_per_code']:.4f}", f"{100 * row['excess']:.3f} %", f"{row['decode_cpu']:.3f}"]
            times = f"{row['decodes_as_fast_as_constriction_times']:.1f}"
            peers = [bits.get((row["source"], peer), "") for peer in CODER_PEERS]
            rows.append([f"{SOURCES[row['source']]}: n = {row['block_of_stream']}{chosen}", *own, times, *peers])
    head = ["bits a code", "lcq", "over H_n", "decoded, cpu s", "constriction's over it", *CODER_PEERS.values()]
    return grid(head, rows)


SMALLEST = {
    "lenet300_3": ("LeNet300, MNIST, 3 % kept, 16 values", "error 2.2 in 14 / 9 kB"),
    "lenet300_3_teacher": ("the same, teacher", "error 2.2 in 14 / 9 kB"),
    "lenet300_2.2_teacher": ("LeNet300, MNIST, 2.2 % kept, 8 values, teacher", "error 2.2 in 14 / 9 kB"),
    "lenet300_2.5_moved": ("LeNet300, MNIST, 2.5 % kept, 8 values, teacher, moved", "error 2.2 in 14 / 9 kB"),
}


def smallest() -> str:
    """The smallest files of whole nets."""
    rows = []
    for name, (title, target) in SMALLEST.items():
        for row in stored(f"smallest_{name}"):
            rows.append([title, f"{row['test_error']:.2f}", f"{row['bytes']:,}", target])
    for name, title in RATES.items():
        for row in stored(f"resnet20_{name}"):
            target = "91.2 % in 60 / 45 kB; 90.5 % in 45 / 36 kB"
            rows.append([f"ResNet-20, CIFAR-10, {title}", f"{100 - row['accuracy']:.2f}", f"{row['bytes']:,}", target])
    return grid(["everything counted", "test error %", "bytes", "accept / aim"], rows)


BINARIES = {
    "float": "float32",
    "sign": "straight-through, sign(w)",
    "bwn": "straight-through, BWN's scales",
    "group_sign": "straight-through, centred groups",
    "tanh": "tanh, annealed",
    "smooth_wide": "**smooth**, as wide to the end",
    "smooth": "**smooth**",
    "smooth_l2": "**smooth**, five times the L2",
    "smooth_mean": "**smooth**, BWN's scales",
    "smooth_learned": "**smooth**, learned scales",
}


def smooth_binary() -> str:
    """Every method: the small net's seeds, ResNet-20, a step's time."""
    times = {row["recipe"]: row for row in stored("smooth_binary_time")}
    rows = []
    for name, title in BINARIES.items():
        found, large = (stored(f"smooth_binary_{net}_{name}") for net in ("small", "resnet20"))
        if not found + large:
            continue
        cells = []
        for kind in ("soft_accuracy", "accuracy"):
            values = [row[kind] for row in found]
            cells.append(f"{statistics.mean(values):.2f} +- {statistics.stdev(values):.2f}" if len(values) > 1 else "")
        cells += [f"{row[kind]:.2f}" for row in large for kind in ("soft_accuracy", "accuracy")] or ["", ""]
        cells += [f"{row['bytes']:,}" for row in large] or [""]
        rows.append([title, *cells, f"{times[name]['ratio']:.2f}" if name in times else ""])
    for row in stored("resnet20_lc_k2_filters"):
        rows.append(["**LC**, K = 2", "", "", "", f"{row['accuracy']:.2f}", f"{row['bytes']:,}", ""])
    head = ["test accuracy %", "small net, t = 1", "deployed", "ResNet-20, t = 1", "deployed", "bytes", "step / float"]
    return grid(head, rows)


NETS = {"lenet5": "LeNet-5, MNIST", "resnet20": "ResNet-20, CIFAR-10"}


def hemp() -> str:
    """Bytes with and without the term at equal errors."""
    rows = []
    for net, title in NETS.items():
        for row in stored(f"hemp_{net}"):
            without, sizes = row["bytes"]["0"], [row["bytes"].get(str(order)) for order in (1, 2, 3)]
            best = row["bytes"]["any"]
            saved = f"{100 * (1 - best / without):.0f} %" if best else ""
            cells = [f"{size:,.0f}" if size else "" for size in (without, *sizes)]
            judge = "held back" if row["judged_by"] == "held_back_error" else "test"
            rows.append([f"{title}, {row['error']:.2f} % {judge}", *cells, saved, "15 / 25 %"])
    head = ["bytes at equal error", "without the term", "n = 1", "n = 2", "n = 3", "smaller by", "accept / aim"]
    return grid(head, rows)


RATES = {
    "lc_k8_rate": "K = 8, rate .0013, teacher",
    "lc_k8_rate_l2": "K = 8, rate .0013, five times the L2",
    "lc_k8_low_rate_l2": "K = 8, rate .0006, five times the L2",
    "lc_k8_evened_rate_l2": "K = 8, rate .0017, less where weights matter more, five times the L2",
}

TABLES: dict[str, Callable[[], str]] = {
    table.__name__: table
    for table in (
        lenet300,
        lenet300_toolkit,
        lenet300_kept,
        resnet20,
        tune,
        cstep,
        lc_overhead,
        brute_force,
        gpfq_images,
        gpfq_transformers,
        gpfq_speed,
        kernels,
        coder,
        smooth_binary,
        hemp,
        smallest,
    )
}


def filled(text: str) -> str:
    """The text with every marked table made anew."""
    for name, table in TABLES.items():
        text = re.sub(BLOCK.format(name), lambda m, t=table: m[1] + t() + m[2], text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    Path(README).write_text(filled(README.read_text()))
