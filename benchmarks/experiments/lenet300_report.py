"""What lenet300.py measured: the tables and the pictures of the README."""

import numpy as np
from matplotlib.figure import Figure

from benchmarks.harness.markdown import grid
from benchmarks.harness.record import RESULTS, stored

RECIPES = {
    "reference": ("float32 (given)", ""),
    "dc_k2": ("1 bit: direct compression", ""),
    "idc_k2": ("1 bit: iterated direct compression", ""),
    "ste_k2": ("1 bit: straight-through", ""),
    "lc_k2": ("1 bit: **LC**", "loss .029 (.024)"),
    "lc_k2_adam": ("1 bit: **LC**, Adam", ""),
    "lc_k2_proximal": ("1 bit: **LC**, proximal", ""),
    "lc_k2_slow": ("1 bit: **LC**, slow", "error 2.3 (2.13)"),
    "lc_k2_slowest": ("1 bit: **LC**, slower", "error 2.3 (2.13)"),
    "lc_k2_teacher": ("1 bit: **LC**, slow, teacher", "error 2.3 (2.13)"),
    "lc_k2_teacher_slowest": ("1 bit: **LC**, slower, teacher", "error 2.3 (2.13)"),
    "dc_trellis1": ("1 bit, trellis: direct compression", ""),
    "lc_trellis1": ("1 bit, trellis: **LC**", ""),
    "dc_ternary": ("scaled ternary: direct compression", ""),
    "lc_ternary": ("scaled ternary: **LC**", "loss .0058 (.0045)"),
    "dc_k4": ("2 bits: direct compression", ""),
    "lc_k4": ("2 bits: **LC**", ""),
    "lc_k4_slow": ("2 bits: **LC**, slow", "error 2.13 (2.0)"),
    "lc_k4_slow_0.2": ("2 bits: **LC**, slow, rate .2", "error 2.13 (2.0)"),
    "lc_k4_teacher": ("2 bits: **LC**, slow, rate .2, teacher", "error 2.13 (2.0)"),
    "lc_k4_teacher_0.09": ("2 bits: **LC**, slow, teacher", "error 2.13 (2.0)"),
    "dc_trellis2": ("2 bits, trellis: direct compression", ""),
    "lc_trellis2": ("2 bits, trellis: **LC**", ""),
}


def table() -> str:
    """Medians over the seeds."""
    by_name = {row["recipe"]: row for name in RECIPES for row in stored(f"lenet300_{name}")}
    rows = []
    for name, (title, target) in RECIPES.items():
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
        ["LeNet300, MNIST", "epochs", "train loss", "test error %", "gap", "bytes", "ratio", "goal (hoped for)"], rows
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


def toolkit() -> str:
    """LC beside what the LC toolkit states, medians over the seeds."""
    rows = []
    for title, (name, stated) in TOOLKIT.items():
        for recipe in stored(f"lenet300_{name}"):
            median, seeds = recipe["median"], len(recipe["runs"])
            numbers = [f"{median['train_loss']:.4f}", f"{median['test_error']:.2f}", f"{stated:.2f}"]
            rows.append([title, *numbers, f"{median['bytes']:,}", f"{median['ratio']:.2f}", str(seeds)])
    return grid(["LeNet300, LC", "train loss", "test error %", "toolkit", "bytes", "ratio", "seeds"], rows)


def kept() -> str:
    """Pruning of all kernels together, by method."""
    methods = {"dc": "direct", "idc": "iterated direct", "ste": "straight-through", "lc": "**LC**"}
    rows = []
    for percent in (10, 5, 3, 2, 1):
        found = {m: row["median"] for m in methods for row in stored(f"lenet300_{m}_l0_{percent}")}
        errors = [f"{found[m]['test_error']:.2f}" if m in found else "" for m in methods]
        last = found.get("lc", {})
        loss, gap = (f"{last['train_loss']:.4f}", f"{last['gap']:.0e}") if last else ("", "")
        target = "loss .00304 (.0025), error 2.1 (1.9)" if percent == 5 else ""
        rows.append([f"{percent} %", *errors, loss, gap, f"{last['ratio']:.1f}" if last else "", target])
    head = ["kept", *(f"{name}, error %" for name in methods.values()), "LC's loss", "gap", "ratio", "goal (hoped for)"]
    return grid(head, rows)


def plot() -> None:
    """Train loss, train error and gap of the 1-bit recipes against epochs: medians, and the range over seeds."""
    names = {"lc_k2": "LC", "lc_k2_adam": "LC, Adam", "lc_k2_proximal": "LC, proximal", "lc_k2_slow": "LC, slow"}
    names |= {"ste_k2": "straight-through", "idc_k2": "iterated direct"}
    results = {row["recipe"]: row for name in RECIPES for row in stored(f"lenet300_{name}")}
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    panels = {"train_loss": "train loss of Delta", "train_error": "train error of Delta, %", "gap": "gap"}
    for axes, (key, title) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for name, label in names.items():
            if name not in results or (key == "gap" and not name.startswith("lc")):
                continue
            curves = [run["curve"] for run in results[name]["runs"]]
            epochs = [point["epoch"] for point in curves[0]]
            values = np.sort([[point[key] for point in curve] for curve in curves], axis=0)
            (line,) = axes.semilogy(epochs, np.median(values, axis=0), label=label, linewidth=1.3)
            axes.fill_between(epochs, values[0], values[-1], color=line.get_color(), alpha=0.15, linewidth=0)
        if key != "gap" and "dc_k2" in results:
            axes.axhline(results["dc_k2"]["median"][key], color="gray", linestyle=":", label="direct compression")
        axes.set(xlabel="epochs", title=title)
    figure.get_axes()[0].legend(fontsize=7)
    figure.savefig(RESULTS / "lenet300.png", dpi=110)


def plot_rates() -> None:
    """Test error against bytes on disk, for every scheme and method, one seed or the median."""
    families = {"codebooks": "k2 k4 k16", "ternary": "ternary", "pruning": "l0_1 l0_2 l0_3 l0_5 l0_10"}
    families |= {"pruning, 16 values": "l0_2_k16 l0_5_k16", "low rank": "rank_5 rank_10 rank_20"}
    families |= {"1 bit + 1 % corrections": "k2_l0_1", "rank 2 + 3 % corrections": "rank_2_l0_3"}
    methods = {"dc": ("direct compression", ":", 0.5), "idc": ("iterated direct", "--", 0.7), "lc": ("LC", "-", 1.0)}
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axes = figure.subplots()
    for i, (family, names) in enumerate(families.items()):
        axes.plot([], [], "osD^vP*"[i], color=f"C{i}", label=family)
        for method, (_, line, strength) in methods.items():
            found = [row["median"] for name in names.split() for row in stored(f"lenet300_{method}_{name}")]
            points = sorted((median["bytes"] / 1e3, median["test_error"]) for median in found)
            across, up = zip(*points, strict=True) if points else ((), ())
            axes.plot(across, up, line, marker="osD^vP*"[i], color=f"C{i}", markersize=5, alpha=strength)
    for label, line, strength in methods.values():
        axes.plot([], [], line, color="black", alpha=strength, label=label)
    (given,) = stored("lenet300_reference")
    axes.axhline(
        given["median"]["test_error"],
        color="gray",
        linewidth=1,
        label=f"float32 (given), {given['median']['bytes'] / 1e3:,.0f} kB",
    )
    axes.set(xscale="log", yscale="log", xlabel="kB on disk", ylabel="test error, %", title="LeNet300, MNIST")
    axes.set_xticks(kilobytes := [10, 20, 40, 80, 160], map(str, kilobytes))
    axes.set_yticks(percent := [2, 3, 5, 10, 20, 50, 100], map(str, percent))
    axes.minorticks_off()
    figure.legend(fontsize=8, loc="outside right center", frameon=False)
    axes.grid(alpha=0.3, linewidth=0.5)
    figure.savefig(RESULTS / "lenet300_rates.png", dpi=110)
