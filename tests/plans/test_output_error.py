"""Prices of choices by a function's outputs, against numpy in float64; the plan against every combination."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lcq

RNG = np.random.default_rng(0)
SCHEMES = [lcq.Levels((-1, 1), scale=True), lcq.Uniform(4), None]


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


PARAMS = {"in": normal(4, 4), "deep": normal(4, 4) / 8, "out": normal(4, 4), "scale": normal(4)}
BATCHES = [normal(7, 4), normal(3, 4)]


def net(params, x):
    hidden = jnp.tanh(x @ params["in"])
    hidden = hidden + jax.nn.relu(hidden @ params["deep"])
    return {"logits": hidden @ params["out"] * params["scale"], "hidden": hidden, "class": hidden.argmax(-1)}


def by_hand(params, x):
    """The same in float64."""
    w, x = ({k: np.asarray(v, np.float64) for k, v in params.items()}, np.asarray(x, np.float64))
    hidden = np.tanh(x @ w["in"])
    hidden = hidden + np.maximum(hidden @ w["deep"], 0)
    return [hidden @ w["out"] * w["scale"], hidden]


def error_by_hand(changed):
    """Of the two outputs that are numbers, over both batches together."""
    change, norm = np.zeros(2), np.zeros(2)
    for x in BATCHES:
        given, made = by_hand(PARAMS, x), by_hand(PARAMS | changed, x)
        change += [((a - b) ** 2).sum() for a, b in zip(given, made, strict=True)]
        norm += [(a**2).sum() for a in given]
    return float((change / norm).sum())


def forms_of(path):
    """(bits, error) of each scheme at one leaf, packed; None is free of error."""
    found = []
    for scheme in SCHEMES:
        if scheme is None:
            found.append((32 * PARAMS[path].size, 0.0))
            continue
        form = lcq.compress({path: PARAMS[path]}, [lcq.Rule(path, scheme)])[path]
        found.append((form.pack().bits, error_by_hand({path: np.asarray(form.dense())})))
    return found


CHOICES = {"in|deep|out": SCHEMES}


def test_the_choice_is_the_best_of_all_by_errors_in_float64():
    paths = ["deep", "in", "out"]
    every = list(itertools.product(*map(forms_of, paths)))
    other = 32 * PARAMS["scale"].size
    for size in (40, 60, 90, 120):
        chosen = lcq.pareto(PARAMS, CHOICES, bytes=size, fn=net, calibration=BATCHES, coded=False)
        within = [each for each in every if other + sum(bits for bits, _ in each) <= 8 * size]
        best = min(within, key=lambda each: math.fsum(error for _, error in each))
        assert [choice.path for choice in chosen.choices] == paths
        assert chosen.distortion == pytest.approx(math.fsum(error for _, error in best), rel=1e-4)
        for choice, (bits, error) in zip(chosen.choices, best, strict=True):
            assert choice.bits == bits and choice.distortion == pytest.approx(error, rel=1e-4, abs=1e-12)


def test_leaves_that_matter_to_the_outputs_get_the_bits():
    """Two leaves with equal numbers, one of which fn hardly reads; distortion of weights cannot tell them apart."""
    w = normal(6, 4)

    def fn(params, x):
        return x @ params["a"] + 0.01 * x @ params["b"]

    schemes = {"a|b": [lcq.Uniform(2, per="channel"), lcq.Uniform(6, per="channel")]}
    for one, other in ((0, 1), (1, 0)):
        params = dict(zip(("a", "b"), (w, w[::-1]), strict=True))

        def swapped(p, x, i=one):
            return fn({"a": p["ab"[i]], "b": p["ab"[1 - i]]}, x)

        plan = lcq.pareto(params, schemes, bytes=56, fn=swapped, calibration=[normal(9, 6)], coded=False)
        assert [choice.scheme.bits for choice in plan.choices] == ([6, 2] if other else [2, 6])
        assert plan.plan.rules == tuple(choice.rule for choice in plan.choices)


def test_numbers_near_the_largest_are_counted_and_zeros_are_not():
    def fn(params, x):
        return {"large": (x @ params["w"]) * 1e30, "nothing": 0 * x}

    params, x = {"w": normal(4, 4)}, normal(5, 4)
    (choice,) = lcq.pareto(params, {"w": [lcq.Binary()]}, bytes=99, fn=fn, calibration=[x]).choices
    form = np.asarray(lcq.decompress(lcq.compress(params, [lcq.Rule("w", lcq.Binary())]))["w"], np.float64)
    w, x = np.asarray(params["w"], np.float64), np.asarray(x, np.float64)
    assert choice.distortion == pytest.approx(((x @ (w - form)) ** 2).sum() / ((x @ w) ** 2).sum(), rel=1e-5)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"fn": net}, "expected fn= and calibration=.* got only fn"),
        ({"calibration": BATCHES}, "got only calibration"),
        ({"fn": net, "calibration": []}, "at least one batch"),
        ({"fn": lambda p, x: (x @ p["in"]).argmax(-1), "calibration": BATCHES}, "floating-point output"),
        ({"fn": lambda p, x: 0 * x @ p["in"], "calibration": BATCHES}, "not always zero"),
        ({"fn": lambda p, x: jnp.log(-jnp.abs(x @ p["in"])), "calibration": BATCHES}, "batch 0: expected finite"),
        ({"fn": lambda p, x: jnp.where(p["in"] == PARAMS["in"], 1, jnp.nan), "calibration": BATCHES}, "drop this"),
    ],
)
def test_bad_input_is_named(given, said):
    with pytest.raises(ValueError, match=said):
        lcq.pareto(PARAMS, CHOICES, bytes=99, **given)


def test_a_leaf_that_is_not_finite_is_named_before_the_batch():
    with pytest.raises(ValueError, match=r"^in: expected finite"):
        lcq.pareto(PARAMS | {"in": PARAMS["in"] * jnp.nan}, CHOICES, bytes=99, fn=net, calibration=BATCHES)


def test_leaves_that_are_forms_already_count_as_what_they_stand_for():
    forms = lcq.compress(PARAMS, [lcq.Rule("in", lcq.Binary())])
    plans = [
        lcq.pareto(params, {"out": SCHEMES[:1]}, bytes=180, fn=net, calibration=BATCHES, coded=False)
        for params in (forms, lcq.decompress(forms))
    ]
    errors = [[choice.distortion for choice in plan.choices if choice.path == "out"] for plan in plans]
    np.testing.assert_allclose(*errors)


def test_a_batch_of_several_parts_is_told_how_it_is_passed():
    with pytest.raises(TypeError) as error:
        lcq.pareto(PARAMS, CHOICES, bytes=99, fn=lambda p, x: x @ p["in"], calibration=[(BATCHES[0], BATCHES[0])])
    assert "fn(params, *batch)" in "".join(error.value.__notes__)
