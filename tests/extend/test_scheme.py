"""A scheme of another package: by its name in texts and plans, and in everything that takes a scheme."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import lcq
from lcq.forms import Cast
from lcq.plans.text import format_scheme, parse_scheme
from lcq.schemes import SCHEMES, Scheme

W = jnp.asarray(np.random.default_rng(0).normal(size=(8, 6)), jnp.float32)


@dataclasses.dataclass(frozen=True)
class Clipped(Scheme):
    """The nearest numbers of at most `most` in size, in bfloat16."""

    most: float = 1.0

    def check(self, shape):
        pass

    def solve(self, xs, previous, mu, weights=None):
        return tuple(Cast(jnp.clip(x, -self.most, self.most).astype(jnp.bfloat16), dtype=str(x.dtype)) for x in xs)


@pytest.fixture(autouse=True)
def known():
    SCHEMES.register("Clipped")(Clipped)
    yield
    SCHEMES.unregister("Clipped")


def test_text_and_plans():
    assert parse_scheme("clipped(0.5)") == Clipped(0.5) and format_scheme(Clipped()) == "Clipped()"
    assert parse_scheme("Additive(Clipped(most=2.0), KMeans(2))").parts[0] == Clipped(2.0)
    plan = lcq.Plan([lcq.Rule("w", Clipped(0.5))])
    assert lcq.plans.parse_plan(str(plan)) == plan
    with pytest.raises(ValueError, match=r"known schemes: .*, Clipped; nearest: Clipped\(most=1.0\)"):
        parse_scheme("Cliped")


def test_from_weights_to_a_file(tmp_path):
    rules = [lcq.Rule("w", Clipped(0.5))]
    preview = lcq.dry_run({"w": W}, rules)
    forms = lcq.compress({"w": W}, rules)
    assert preview.rows[0].scheme == "Clipped(most=0.5)" and preview.rows[0].bits == forms["w"].bits
    lcq.save(tmp_path / "net.lcq", forms, plan=lcq.Plan(rules))
    assert lcq.read_plan(tmp_path / "net.lcq").rules == tuple(rules)
    back = lcq.load(tmp_path / "net.lcq")
    np.testing.assert_array_equal(back["w"].dense(), forms["w"].dense())
    assert float(jnp.abs(lcq.packed(lambda p, x: x @ p["w"])(back, jnp.eye(8))).max()) == 0.5


@pytest.mark.parametrize("result, got", [(lambda xs: xs, "ArrayImpl"), (lambda xs: lcq.forms.Cast(xs[0]), "Cast")])
def test_what_solve_returns_has_to_be_a_tuple_of_forms(monkeypatch, result, got):
    monkeypatch.setattr(Clipped, "solve", lambda self, xs, previous, mu, importance=None: result(xs))
    monkeypatch.setattr(Clipped, "host", True)
    with pytest.raises(ValueError, match=rf"w: expected Clipped.solve to return a tuple of forms, .* got {got}"):
        lcq.compress({"w": W}, [lcq.Rule("w", Clipped())])
