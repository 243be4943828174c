"""Entropy-coded trellises against a search through all paths in numpy's float64, and against codebooks with a rate."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lcq
from lcq.io.entropy_coding.coded_bits import coded_bits
from lcq.schemes.coded_trellis import viterbi
from lcq.schemes.coded_trellis.viterbi import cheapest_paths

RNG = np.random.default_rng(0)
UNGERBOECK = {2: "5 2", 3: "13 4", 4: "23 4", 5: "45 10", 6: "103 24", 7: "235 126", 8: "515 362"}  # octal


def follows(codes, memory):
    """Whether each integer has the parity that the code says, by polynomials over GF(2) on the bits written so far."""
    h0, h1 = (int(text, 8) for text in UNGERBOECK[memory].split())
    bits = []
    for c in codes:
        past = [0, *bits[::-1]]  # D^0 is the bit that is not known yet
        odd, flip = (sum(b for i, b in enumerate(past) if h >> i & 1) % 2 for h in (h1, h0))
        if c % 2 != odd:
            return False
        bits.append((c // 2 + flip) % 2)
    return True


def legal_paths(length, levels, memory):
    return [codes for codes in itertools.product(range(levels), repeat=length) if follows(codes, memory)]


def cost(v, g, lengths, codes):
    codes = np.asarray(codes)
    return ((v - g * (codes - len(lengths) // 2)) ** 2 + lengths[codes]).sum()


@pytest.mark.parametrize("memory", [2, 3, 4])
def test_no_path_is_cheaper(memory):
    length, levels = 6, 8
    v, g = RNG.normal(size=(length, 3)), RNG.uniform(0.1, 1, (length, 3))
    lengths = RNG.uniform(0, 0.6, levels)
    found = cheapest_paths(*(jnp.asarray(a, jnp.float32) for a in (v, g, lengths)), memory)
    legal = legal_paths(length, levels, memory)
    for i in range(3):
        assert follows(np.asarray(found)[:, i], memory)
        least = min(cost(v[:, i], g[:, i], lengths, codes) for codes in legal)
        assert cost(v[:, i], g[:, i], lengths, np.asarray(found)[:, i]) == pytest.approx(least, rel=1e-5)


@pytest.mark.parametrize("memory", [5, 6, 7, 8])
def test_paths_of_many_states_are_legal_and_chunks_do_not_matter(memory, monkeypatch):
    v, g = RNG.normal(size=(24, 5)), np.full((24, 5), 0.3)
    args = [jnp.asarray(a, jnp.float32) for a in (v, g, np.full(16, 0.1))]
    whole = np.asarray(cheapest_paths(*args, memory))
    assert all(follows(column, memory) for column in whole.T)
    monkeypatch.setattr(viterbi, "_LANES", 2)
    np.testing.assert_array_equal(cheapest_paths(*args, memory), whole)


def entropy(codes):
    """Bits of integers, each among those of its parity."""
    total = 0.0
    for kind in (0, 1):
        count = np.unique(codes[codes % 2 == kind], return_counts=True)[1]
        total += (count * np.log2(count.sum() / count)).sum()
    return total


def test_a_gaussian_takes_fewer_bits_than_codebooks_at_equal_error():
    """Of the codebook the entropy alone counts, and its curve of errors and bits goes on with the slope of the rate."""
    x = np.random.default_rng(1).normal(size=(128, 64)).astype(np.float32)
    rate = 0.3
    scheme = lcq.CodedTrellis(rate, memory=4)
    form, base = scheme.project(jnp.asarray(x)), lcq.KMeans(16, rate=rate).project(jnp.asarray(x))
    error, other = (((x - np.asarray(f.dense(), np.float64)) ** 2).mean() for f in (form, base))
    count = np.bincount(np.asarray(base.codes).reshape(-1))
    equal = (count[count > 0] * np.log2(x.size / count[count > 0])).sum() / x.size + (other - error) / rate
    codes = np.asarray(form.codes)
    bits = entropy(codes.reshape(-1)) / x.size
    assert bits < 0.9 * equal
    z = codes - 128.0
    assert (z * x).sum() / (z * z).sum() == pytest.approx(float(form.scale.reshape(())), rel=1e-4)
    assert coded_bits(form).coded / x.size < 1.02 * bits + 0.05
    assert scheme.charge((form,), None) == pytest.approx(rate * bits * x.size, rel=1e-4)


def test_an_integer_that_most_weights_take_is_counted_to_the_end():
    """Ones added up in float32 stop at 2^24."""
    often, seldom = 3 << 23, 1 << 22
    form = lcq.CodedTrellis(0.3).project(jnp.asarray(RNG.normal(size=(8, 8)), jnp.float32))
    form = dataclasses.replace(form, codes=jnp.full(often + seldom, 128, jnp.uint8).at[:seldom].set(130))
    bits = sum(n * np.log2((often + seldom) / n) for n in (often, seldom))
    assert lcq.CodedTrellis(0.3).charge((form,), None) == pytest.approx(0.3 * bits, rel=1e-4)


def test_files_hold_what_was_made(tmp_path):
    params = {
        "w": jnp.asarray(RNG.normal(size=(48, 40)), jnp.float32),
        "half": jnp.asarray(RNG.normal(size=(33, 7)), jnp.bfloat16),
        "layers": jnp.asarray(RNG.normal(size=(3, 16, 8)), jnp.float32),
        "joint": [jnp.asarray(s * RNG.normal(size=(16, n)), jnp.float32) for s, n in ((0.1, 8), (2.0, 4))],
        "zeros": jnp.zeros((5, 3)),
        "one": jnp.asarray(1.5),
    }
    scheme = lcq.CodedTrellis(0.05, memory=5, scale_dtype="bfloat16")
    rules = [
        lcq.Rule("layers", scheme, stacked=1),
        lcq.Rule("joint/.*", scheme, joint=True),
        lcq.Rule(".*", scheme),
    ]
    forms = lcq.compress(params, rules)
    size = lcq.save(tmp_path / "net.lcq", forms, plan=lcq.Plan(rules))
    back = lcq.load(tmp_path / "net.lcq")
    jax.tree.map(np.testing.assert_array_equal, lcq.decompress(back), lcq.decompress(forms))
    assert lcq.Plan(rules) == lcq.read_plan(tmp_path / "net.lcq")
    assert forms["joint"][0].scale == forms["joint"][1].scale and forms["layers"].scale.size == 3
    assert forms["half"].dense().dtype == jnp.bfloat16 and not forms["zeros"].dense().any()
    assert float(forms["one"].dense()) == pytest.approx(1.5, rel=0.01)
    counted = sum(coded_bits(form).coded for form in jax.tree.leaves(forms, is_leaf=lambda f: hasattr(f, "codes"))) / 8
    assert counted < size < counted + 3000
    assert "coded trellis, 32 states" in str(lcq.table(forms)) and lcq.dry_run(params, rules) is not None
    damaged = np.asarray(back["w"].pack().odd)[:-1]
    with pytest.raises(ValueError, match=r"odd: expected uint32\[\d+\] for \d+ codes of 7 bits, got"):
        type(back["w"])(**{**vars(back["w"].pack()), "odd": damaged}).check_stored()


def test_products_are_with_decoded_integers():
    w, x = (jnp.asarray(RNG.normal(size=shape), jnp.float32) for shape in ((32, 8), (3, 32)))
    form = lcq.CodedTrellis(0.05, memory=4).project(w)
    run = lcq.packed(lambda w, x: x @ w)
    for given in (form.pack(), run.prepack(form.pack(), x)):
        np.testing.assert_allclose(run(given, x), x @ form.dense(), rtol=1e-4, atol=1e-5)
    assert type(given).__name__ == "Columns"
    np.testing.assert_allclose(lcq.packed(lambda w, x: x @ w.T)(form, x[:, :8]), x[:, :8] @ form.dense().T, atol=1e-5)
    np.testing.assert_array_equal(lcq.packed(lambda w, i: w[i])(form, jnp.arange(3)), form.dense()[:3])


def test_pareto_weighs_it_against_others():
    w = jnp.asarray(RNG.normal(size=(64, 64)), jnp.float32)
    choices = {"w": [lcq.Binary(), lcq.Ternary(), lcq.CodedTrellis(0.3, memory=3)]}
    best = lcq.pareto({"w": w}, choices, bytes=700)
    assert "CodedTrellis(0.3" in str(best.plan)


def test_numbers_of_any_size_and_what_is_out_of_reach():
    x = jnp.asarray(RNG.normal(size=(32, 8)), jnp.float32)
    plain = lcq.CodedTrellis(0.05, memory=4).project(x).dense()
    for size in (2.0**-60, 2.0**60):
        scaled = lcq.CodedTrellis(0.05 * size**2 if size < 1 else 1e38, memory=4).project(x * size)
        assert bool(jnp.isfinite(scaled.dense()).all())
        if size < 1:
            np.testing.assert_allclose(scaled.dense() / size, plain, rtol=1e-5)
    narrow = lcq.CodedTrellis(1e-6, width=4, memory=3).project(x)  # the step grows until 16 integers are enough
    assert float(((narrow.dense() - x) ** 2).mean()) < 0.05
    assert not lcq.CodedTrellis(1e6, memory=4).project(x).dense().any()


def test_as_the_c_step_of_lc():
    w = {"kernel": jnp.asarray(RNG.normal(size=(32, 4)), jnp.float32)}
    target = w["kernel"] + 0.1
    rules = [lcq.Rule("kernel", lcq.CodedTrellis(0.02, memory=4))]
    tx = lcq.lc(optax.sgd(0.1), rules, mu=lcq.geometric(0.1, 1.5, steps=12), every=5)
    state, update = tx.init(w), jax.jit(tx.update)
    for _ in range(60):
        updates, state = update({"kernel": w["kernel"] - target}, state, w)
        w = optax.apply_updates(w, updates)
    assert float(lcq.metrics(state)["gap"]) < 0.02
    assert float(((lcq.extract(state, w)["kernel"].dense() - target) ** 2).mean()) < 0.1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rate": 0}, "expected a rate > 0, finite in float32, got 0"),
        ({"rate": float("nan")}, "expected a rate > 0"),
        ({"memory": 9}, "expected memory from 2 to 8, got 9"),
        ({"width": 2}, "expected width from 3 to 16, got 2"),
        ({"block": 0}, "expected block= a number of weights"),
        ({"scale_dtype": "int8"}, "scale_dtype: expected"),
    ],
)
def test_settings_are_checked(settings, words):
    with pytest.raises(ValueError, match=words):
        lcq.CodedTrellis(**{"rate": 0.1, **settings})


def test_weights_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="w: expected finite weights"):
        lcq.compress({"w": jnp.array([1.0, jnp.nan])}, [lcq.Rule("w", lcq.CodedTrellis(0.1))])
