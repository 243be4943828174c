"""A budget of bytes over real projections, against every combination of the candidates."""

import dataclasses
import functools
import io
import itertools
import math
import re

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
from rich.console import Console

import lcq
from lcq.examples import data, models
from lcq.io.entropy_coding import rans
from lcq.io.file import read_index
from lcq.plans.allocation import Allocation, Choice
from lcq.plans.allocation import pareto as pareto_of_files
from lcq.schemes.base import Scheme

pareto = functools.partial(pareto_of_files, coded=False)

CANDIDATES = [lcq.KMeans(2), lcq.Ternary(per="channel"), lcq.KMeans(16), lcq.Cast("bfloat16"), None]


def params():
    rng = np.random.default_rng(0)
    tree = {
        name: {"kernel": jnp.asarray(rng.normal(scale=scale, size=shape), jnp.float32), "bias": jnp.ones(shape[1])}
        for name, scale, shape in (("a", 1.0, (12, 8)), ("b+", 0.1, (12, 8)), ("c", 3.0, (5, 3)))
    }
    return tree | {"count": jnp.arange(3), "half": jnp.asarray(rng.normal(size=(6, 6)), jnp.bfloat16)}


def importance(tree):
    rng = np.random.default_rng(1)
    h = {f"{k}/kernel": rng.lognormal(sigma=2, size=(v["kernel"].shape[0], 1)) for k, v in tree.items() if len(k) < 3}
    return {path: jnp.asarray(each * 10.0**i, jnp.float32) for i, (path, each) in enumerate(h.items())}


def measured(tree, rules, h=None):
    """Bits and distortion of the whole tree, by what users see: compress, sizes, decompress; sums in float64."""
    done = lcq.compress(tree, rules, importance=h)
    packed = jax.tree.map(lambda f: f.pack() if lcq.forms.base.is_form(f) else f, done, is_leaf=lcq.forms.base.is_form)
    bits = sum(size.bits for size in lcq.sizes(packed).values())
    w, dense = (lcq.tree.rules.flatten(t)[0] for t in (tree, lcq.decompress(done)))
    far = {path: (np.asarray(w[path], np.float64) - np.asarray(dense[path], np.float64)) ** 2 for path in w}
    return bits, sum(float(np.sum(e * np.asarray((h or {}).get(p, 1), np.float64))) for p, e in far.items())


@pytest.mark.parametrize("weighted", [False, True])
def test_every_point_of_the_curve_is_the_best_of_its_size(weighted):
    tree, paths = params(), ["a/kernel", "b+/kernel", "c/kernel"]
    h = importance(tree) if weighted else None

    def alone(path, scheme):
        of_leaf = {path: h[path]} if weighted and scheme else None
        return measured(tree, [lcq.Rule(re.escape(path), scheme)], of_leaf)

    bare = sum(size.bits for size in lcq.sizes(tree).values())
    cost = {(path, scheme): alone(path, scheme) for path in paths for scheme in CANDIDATES}
    every = []
    for chosen in itertools.product(CANDIDATES, repeat=len(paths)):
        each = [cost[pair] for pair in zip(paths, chosen, strict=True)]
        every.append((bare + sum(bits - bare for bits, _ in each), math.fsum(error for _, error in each)))

    curve = pareto(tree, {".*/kernel": CANDIDATES}, bytes=10**6, importance=h).curve
    assert len(curve) > 6 and curve[-1][1] == 0
    assert curve[0][0] == -(-min(bits for bits, _ in every) // 8)
    for i, (size, error) in enumerate(curve):
        best = pareto(tree, {".*/kernel": CANDIDATES}, bytes=size, importance=h)
        assert (best.bytes, best.distortion) == (size, pytest.approx(error, rel=1e-15)) and best.curve == curve
        assert best.distortion == pytest.approx(min(d for b, d in every if b <= best.bits), rel=1e-9, abs=1e-12)
        assert 0 <= best.unused < 8
        given = {choice.path: h[choice.path] for choice in best.choices if choice.scheme} if weighted else None
        assert measured(tree, best.plan, given) == (best.bits, pytest.approx(error, rel=1e-9))
        if i:
            less = pareto(tree, {".*/kernel": CANDIDATES}, bytes=size - 1, importance=h)
            assert less.unused == 8 * (size - 1) - less.bits >= 0 and less.distortion > error
            wanted = min(d for b, d in every if b <= 8 * (size - 1))
            assert less.distortion == less.bound == pytest.approx(wanted, rel=1e-9) and wanted <= curve[i - 1][1]


@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize(
    "budget", [{"bytes": 3000}, {"bytes": 2411}, {"bits_per_weight": 3.3}, {"bits_per_weight": 2.7}]
)
def test_a_budget_for_few_leaves(coded, budget):
    net = models.small_digits_net()
    tree = net.init(jax.random.key(0), data.digits().x_train[:1])["params"]
    schemes = [lcq.KMeans(2), lcq.KMeans(4), lcq.KMeans(16)]
    found = pareto_of_files(tree, {"(.*/)?kernel": schemes}, coded=coded, **budget)
    w, paths = lcq.tree.rules.flatten(tree)[0], [f"dense{i}/kernel" for i in range(3)]
    cost = {}
    for path, scheme in itertools.product(paths, schemes):
        form = scheme.project(w[path]).pack()
        size = 8 * len(rans.encode(codes_of(form), scheme.k)) if coded else w[path].size * (scheme.k - 1).bit_length()
        error = np.sum((np.asarray(w[path], np.float64) - np.asarray(form.dense(), np.float64)) ** 2)
        cost[path, scheme] = size + 32 * scheme.k, float(error)
    rest = sum(32 * a.size for path, a in w.items() if path not in paths)
    limit = 8 * budget["bytes"] if "bytes" in budget else budget["bits_per_weight"] * sum(a.size for a in w.values())
    best = math.inf
    for chosen in itertools.product(schemes, repeat=3):
        each = [cost[pair] for pair in zip(paths, chosen, strict=True)]
        if rest + sum(bits for bits, _ in each) <= limit:
            best = min(best, math.fsum(error for _, error in each))
    assert found.distortion == pytest.approx(best, rel=1e-6) and found.bits <= limit
    assert found.bound == found.distortion
    if budget == {"bytes": 3000} and not coded:
        rules = found.plan
        forms = lcq.compress(tree, rules)
        assert sum(size.bits for size in lcq.sizes(forms).values()) == found.bits


def codes_of(form):
    return np.asarray(form.unpack().codes).reshape(-1)


def test_importances_matter_as_they_are():
    """Ten times the weight of a leaf is ten times its distortion, though its projection stays the same."""
    tree = {"a": jnp.array([0.0, 1.0, 2.0, 3.0]), "b": jnp.array([0.0, 1.0, 2.0, 3.0])}
    for heavy, light in (("a", "b"), ("b", "a")):
        h = {heavy: jnp.full(4, 10.0), light: jnp.ones(())}
        best = pareto(tree, {".": [lcq.KMeans(2), lcq.KMeans(4)]}, bytes=30, importance=h)
        assert {c.path: c.scheme.k for c in best.choices} == {heavy: 4, light: 2}
        assert best.distortion == 1.0 and best.curve[0][1] == 11.0


def test_the_plan_compresses_and_starts_lc():
    tree = params()
    best = pareto(tree, {"half": [None], "c/.*": [lcq.Cast()], "(.*/)?kernel": CANDIDATES}, bytes=1300)
    assert [choice.path for choice in best.choices] == ["a/kernel", "b+/kernel", "c/bias", "c/kernel"]
    assert best.plan[1].pattern == r"b\+/kernel" and lcq.plans.plan.parse_plan(str(best.plan)) == best.plan
    forms = lcq.compress(tree, best.plan)
    assert lcq.table(forms).total.bits == best.bits <= 8 * 1300
    lcq.lc(optax.sgd(0.1), best.plan, mu=1.0, every=1).init(tree)


def test_bits_per_weight_count_every_number_of_the_tree():
    tree = {"w": jnp.linspace(-1, 1, 1024).reshape(32, 32), "b": jnp.ones(1024)}
    schemes = [lcq.Uniform(bits) for bits in range(2, 9)]
    best = pareto(tree, {"w": schemes}, bits_per_weight=18.1)
    assert best.budget == math.floor(18.1 * 2048) and best.choices[0].scheme == lcq.Uniform(4)
    assert best.bits == 1024 * 32 + 1024 * 4 + 32


def test_it_prints_every_leaf_and_where_the_budget_went():
    best = pareto(params(), {".*/kernel": CANDIDATES}, bytes=1000)
    lines = [line.split() for line in str(best).splitlines()]
    for choice in best.choices:
        (line,) = [line for line in lines if line[:1] == [choice.path]]
        assert (
            f"{choice.bits:,}" in line
            and f"{choice.distortion:.2e}" in line
            and "x".join(map(str, choice.shape)) in line
        )
    assert ["total", f"{best.bits:,}", f"{best.bytes:,}", f"{best.distortion:.2e}"] in lines
    assert ["unused", f"{best.unused:,}", f"{-(-best.unused // 8):,}"] in lines
    assert "everything else" in str(best)
    smallest = pareto(params(), {"a/kernel": [lcq.Ternary(per="channel")]}, bytes=1000)
    assert "Ternary(per='channel')" in str(smallest) and "100.0%" in str(smallest)
    assert "nan" not in str(Allocation((Choice("w", (2,), None, 64, 0.0),), 0, 64, ((8, 0.0),)))


def test_in_a_narrow_terminal_names_are_whole():
    paths = [f"encoder/layer{i}/attention_norm/kernel" for i in range(2)]
    choices = tuple(Choice(path, (64, 64), lcq.Uniform(4, per="channel"), 16_384, 0.25) for path in paths)
    for width in (60, 80, 200):
        console = Console(file=io.StringIO(), width=width)
        with console.capture() as captured:
            console.print(Allocation(choices, 0, 40_000, ((8, 0.0),)))
        lines = captured.get().splitlines()
        pieces = {piece for line in lines for piece in re.findall(r"[a-z0-9]+[/_]?", line.split("  ")[0])}
        assert {"encoder/", "layer0/", "layer1/", "attention_", "norm/", "kernel"} <= pieces
        assert max(map(len, lines)) <= width and ("no room" in captured.get()) is (width < 200)


@dataclasses.dataclass(frozen=True)
class Costly(Scheme):
    """A penalty, not a constraint."""

    @property
    def costly(self):
        return True

    def check(self, shape):
        del shape

    def solve(self, xs, previous, mu):
        raise AssertionError


class Endless(Costly):
    """Its forms hold no finite numbers."""

    costly = False

    def solve(self, xs, previous, mu):
        del previous, mu
        return tuple(lcq.forms.Cast(jnp.full(x.shape, jnp.inf, jnp.bfloat16)) for x in xs)


def test_a_cast_of_numbers_beyond_its_range_costs_what_it_loses():
    best = pareto({"huge": jnp.full(2, 1e30), "w": jnp.ones(2)}, {"huge|w": [lcq.Cast("float16")]}, bytes=8)
    lost = 2 * (float(np.float32(1e30)) - 65504.0) ** 2
    assert [choice.distortion for choice in best.choices] == [pytest.approx(lost, rel=1e-12), 0.0]
    kept = pareto({"huge": jnp.full(2, 1e30)}, {"huge": [lcq.Cast("float16"), None]}, bytes=8)
    assert kept.choices[0].scheme is None and kept.distortion == 0.0


@pytest.mark.parametrize(
    ("candidates", "more", "complaint"),
    [
        ({".*/kernel": CANDIDATES}, {}, "expected one budget, bytes= or bits_per_weight=, got none"),
        ({".*/kernel": CANDIDATES}, {"bytes": 9, "bits_per_weight": 1.0}, "got both"),
        ({".*/kernel": CANDIDATES}, {"bits_per_weight": math.nan}, "expected a budget that is a number >= 0, got nan"),
        ({".*/kernel": CANDIDATES}, {"bytes": -1}, "expected a budget that is a number >= 0, got -1"),
        ({".*/kernel": CANDIDATES}, {"bytes": 9}, "expected a budget of at least "),
        ({}, {"bytes": 1000}, "expected candidates such as"),
        ({".*/kernel": [None]}, {"bytes": 1000}, "expected candidates such as"),
        ({".*/kernel": []}, {"bytes": 1000}, "'.*/kernel': expected a list of schemes to choose from, got []"),
        ({".*/kernel": lcq.KMeans(2)}, {"bytes": 1000}, "expected a list of schemes to choose from, got KMeans(k=2"),
        ({"kernle": [None]}, {"bytes": 1000}, "rule 'kernle' matches no leaf"),
        ({".*": CANDIDATES}, {"bytes": 1000}, "count: rule '.*' wants a floating-point array, got int32[3]"),
        ({".*/.*": CANDIDATES, "a/kernel": CANDIDATES}, {"bytes": 1000}, "decides no leaf: earlier rules take"),
        ({"a/bias": [lcq.Uniform(4, per=4)]}, {"bytes": 1000}, "a/bias: "),
        ({".*/kernel": [lcq.KMeans(2), Costly()]}, {"bytes": 1000}, "'.*/kernel': Costly() has a cost"),
        (
            {"b.*/kernel": CANDIDATES},
            {"bytes": 1000, "importance": {}},
            "b+/kernel: expected importances of the leaves with",
        ),
        (
            {"a/kernel": CANDIDATES},
            {"bytes": 1000, "importance": {"a/kernel": jnp.ones(1), "x": 1}},
            "x: expected importances",
        ),
        (
            {"a/kernel": CANDIDATES},
            {"bytes": 1000, "importance": {"a/kernel": -jnp.ones(1)}},
            "a/kernel: importance: expected",
        ),
        ({"a/kernel": [Endless()]}, {"bytes": 1000}, "a/kernel: expected finite numbers; Endless() gave others"),
        ({"nan": CANDIDATES}, {"bytes": 1000}, "nan: expected finite weights"),
    ],
)
def test_errors_at_the_door(candidates, more, complaint, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    tree = params() | {"nan": jnp.array([jnp.nan])}
    with pytest.raises(ValueError, match=r"(?s).*") as caught:
        pareto(tree, candidates, **more)
    assert complaint in str(caught.value)


def test_the_smallest_budget_that_is_named_is_enough():
    tree = params()
    with pytest.raises(ValueError, match="at least") as caught:
        pareto(tree, {".*/kernel": CANDIDATES}, bytes=0)
    size = int(re.search(r"at least (\d+) bytes", str(caught.value))[1])
    best = pareto(tree, {".*/kernel": CANDIDATES}, bytes=size)
    assert best.bytes == size and best.curve[0] == (size, best.distortion)
    exact = pareto({"w": jnp.linspace(-1, 1, 32)}, {"w": [lcq.Binary(), None]}, bytes=8)
    assert exact.bits == 64 and exact.unused == 0


def test_progress_and_compilations(monkeypatch):
    """Leaves of one shape are compiled once for each scheme."""
    seen, solved = [], []

    class Counted(Costly):
        costly = False

        def solve(self, xs, previous, mu):
            solved.append(xs[0].shape)
            return lcq.Cast("bfloat16").solve(xs, previous, mu)

    rng = np.random.default_rng(0)
    tree = {f"layer{i:02}": jnp.asarray(rng.normal(size=(64, 64)), jnp.float32) for i in range(30)}
    best = pareto(tree, {".*": [Counted(), None]}, bytes=10**6, progress=lambda *where: seen.append(where))
    assert seen == [(i + 1, 30, f"layer{i:02}") for i in range(30)] and solved == [(64, 64)]
    assert best.bytes == 30 * 64 * 64 * 4 and best.distortion == 0


def test_coded_prices_are_those_of_the_file(tmp_path):
    rng = np.random.default_rng(3)
    few = jnp.asarray(rng.normal(size=(60, 50)) * (rng.random((60, 50)) < 0.05), jnp.float32)
    tree = {"few": few, "full": jnp.asarray(rng.normal(size=(40, 30)), jnp.float32)}
    candidates = {".*": [lcq.KMeans(4, fixed=(0.0,)), lcq.KMeans(16, fixed=(0.0,)), lcq.Prune(count=50)]}
    best = pareto_of_files(tree, candidates, bytes=900)
    lcq.save(tmp_path / "net.lcq", lcq.compress(tree, best.plan.rules))
    sizes = read_index(tmp_path / "net.lcq").sizes
    for choice in best.choices:
        assert choice.bits == 8 * sum(size for name, size in sizes.items() if name.startswith(f"{choice.path}."))
    assert best.bits == 8 * sum(sizes.values()) <= 8 * 900
    packed = pareto(tree, candidates, bytes=1100)
    assert best.distortion < packed.distortion and best.bytes < packed.bytes
