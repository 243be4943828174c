"""Forms of another package: one with what is abstract alone, and one that says all; both go everywhere."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lcq
from lcq.forms import FORMS, Form, leafwise, own, register_form
from lcq.forms.base import tree_form
from lcq.schemes import Scheme

RNG = np.random.default_rng(0)
W = jnp.asarray(RNG.normal(size=(4, 8, 6)), jnp.float32)
X = jnp.asarray(RNG.normal(size=(5, 8)), jnp.float32)


@tree_form
class Plain(Form):
    """Whole numbers and a step for each row along the last axis: Delta = step * codes. Nothing but what is abstract."""

    codes: Any = leafwise()
    step: Any = own()

    @property
    def shape(self):
        return self.codes.shape

    @property
    def bits(self):
        return 8 * self.codes.size + 32 * self.step.size

    def dense(self):
        return (self.step[..., None] * self.codes).astype(self.dtype)

    def pack(self):
        return jax.device_get(self)

    def unpack(self):
        return self

    def check_stored(self):
        if self.codes.dtype != np.int8 or self.step.shape != self.codes.shape[:-1]:
            raise ValueError("expected int8 codes and a step for each row, got others")


@tree_form
class Rows(Plain):
    """The same, and how it is moved, taken apart, multiplied and described."""

    def describe(self):
        return f"rows of int8, {self.step.size} steps"

    def one_per(self):
        return "row"

    def relayout(self, change):
        if change.idle:
            return self
        tables = change.tables({"step": self.step[..., None]})
        if tables is None or tables["step"].shape[-1] != 1:
            return None
        step = tables["step"][..., 0]
        for axis, length in enumerate(change.result[:-1]):
            step = jnp.repeat(step, length // step.shape[axis], axis)
        return self._some(change.function, lambda _: step)

    def take_rows(self, rows):
        return self._some(lambda codes: codes[rows], lambda step: step[rows])

    def unstack(self):
        return self._some(jnp.asarray, jnp.asarray) if len(self.shape) > 1 else None

    def product(self, x, matmul):
        stacked = len(self.shape) > 2
        return (x * (self.step[:, None] if stacked else self.step)) @ self.codes.astype(x.dtype)

    def _some(self, of_codes, of_step):
        return dataclasses.replace(self, codes=of_codes(self.codes), step=of_step(self.step))


@dataclasses.dataclass(frozen=True)
class ToInt8(Scheme):
    """The form of a kind with the least steps that reach the largest weights."""

    kind: type

    def check(self, shape):
        if not shape:
            raise ValueError("expected an axis, got none")

    def solve(self, xs, previous, mu, weights=None):
        return tuple(self._one(x) for x in xs)

    def _one(self, x):
        step = jnp.maximum(jnp.abs(x).max(-1), 1e-12) / 127
        return self.kind(jnp.round(x / step[..., None]).astype(jnp.int8), step=step, dtype=str(x.dtype))


@pytest.fixture(params=[Plain, Rows])
def kind(request):
    FORMS.register(request.param.__name__)(request.param)
    yield request.param
    FORMS.unregister(request.param.__name__)


def compressed(kind, w=W):
    return lcq.compress({"w": w, "b": jnp.zeros(6)}, [lcq.Rule("w", ToInt8(kind))])


def close(a, b):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=2e-4, atol=2e-4)


def test_compress_and_decompress(kind):
    forms = compressed(kind)
    assert type(forms["w"]) is kind and lcq.sizes(forms)["w"].bits == forms["w"].bits == 8 * W.size + 32 * 32
    close(lcq.decompress(forms)["w"], jnp.round(W / forms["w"].step[..., None]) * forms["w"].step[..., None])


def test_lc(kind):
    """The constraint pulls the weights to what the form can hold, and the end of the run is a form."""
    params = {"w": W[0]}
    tx = lcq.lc(optax.sgd(0.1), [lcq.Rule("w", ToInt8(kind))], mu=1.0, every=1, multipliers=False)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(3):
        params, state = step(params, state)
    form = lcq.extract(state, params)["w"]
    before = ToInt8(kind).project(W[0]).dense() - W[0]
    assert type(form) is kind and lcq.metrics(state)
    assert jnp.linalg.norm(form.dense() - params["w"]) < 0.9 * jnp.linalg.norm(before)


@pytest.mark.parametrize("coded", [True, False])
def test_save_and_load(kind, coded, tmp_path):
    forms = compressed(kind)
    lcq.save(tmp_path / "net.lcq", forms, coded=coded)
    back = lcq.load(tmp_path / "net.lcq")["w"]
    assert type(back) is kind
    np.testing.assert_array_equal(back.dense(), forms["w"].dense())
    FORMS.unregister(kind.__name__)
    try:
        with pytest.raises(lcq.ArtifactError, match=rf"got '{kind.__name__}'; import the package that registers it"):
            lcq.load(tmp_path / "net.lcq")
        with pytest.raises(ValueError, match=rf"w: expected a form that files have a name for, got {kind.__name__}"):
            lcq.save(tmp_path / "other.lcq", forms)
    finally:
        FORMS.register(kind.__name__)(kind)


NETS = {
    "product": lambda p, x: x @ p["w"][0],
    "flat": lambda p, x: jnp.tile(x, 4) @ p["w"].reshape(32, 6),
    "turned": lambda p, x: p["w"][1].T @ x.T,
    "looked up": lambda p, x: p["w"][jnp.array([2, 0])].sum() + x.sum(),
    "scan": lambda p, x: jax.lax.scan(lambda y, w: (jnp.tanh(y @ w @ w.T), None), x, p["w"])[0],
    "experts": lambda p, x: jnp.einsum("ek,ekn->en", x[:4], p["w"]),
    "anything": lambda p, x: jnp.sort(p["w"]).sum() + x.sum(),
}


@pytest.mark.parametrize("net", NETS)
def test_packed(kind, net):
    forms, run = compressed(kind), lcq.packed(NETS[net])
    wanted = NETS[net](lcq.decompress(forms), X)
    for tree in (forms, run.prepack(forms, X)):
        close(jax.jit(run)(tree, X), wanted)
    how = {use.how for use in run.report(forms, X)}
    expected = {"looked up": "rows", "anything": "dense"}.get(net, "product")
    assert how == {"dense"} if kind is Plain and net != "experts" else expected in how, how


def test_a_form_multiplies_as_it_says():
    net = NETS["flat"]
    assert lcq.packed(net).report(compressed(Rows), X)[0].how == "product"
    steps, codes = compressed(Rows)["w"].step.reshape(32), compressed(Rows)["w"].codes.reshape(32, 6)
    close(lcq.packed(net)(compressed(Rows), X), (jnp.tile(X, 4) * steps) @ codes)


def test_tables_and_pages(kind, tmp_path):
    forms = compressed(kind)
    found = {row.path: row for row in lcq.table(forms, {"w": W, "b": jnp.zeros(6)}).rows}
    assert (found["w"].form, found["w"].blocks) == (
        ("plain", "") if kind is Plain else ("rows of int8, 32 steps", "row")
    )
    assert found["w"].compressed and found["w"].distortion < 1e-3
    lcq.reporting.write_page(tmp_path / "page.html", forms, {"w": W, "b": jnp.zeros(6)})
    assert found["w"].form in (tmp_path / "page.html").read_text()


def test_quantize_projects_it(kind):
    def net(params, x):
        return x @ params["w"] @ params["v"]

    params = {"w": W[0], "v": W[1].T}
    rules = [lcq.Rule("v", lcq.Uniform(4))]
    done = lcq.quantize(net, params, [X], rules, rtn=[lcq.Rule("w", ToInt8(kind))])
    assert type(done.forms["w"]) is kind and [record.path for record in done.records] == ["v"]


def test_a_name_belongs_to_one_form():
    with pytest.raises(ValueError, match="expected a name that is free among the forms, got 'Codes'"):
        register_form(type("Codes", (Plain,), {"__module__": "elsewhere"}))


def test_a_cell_of_a_notebook_may_be_run_twice():
    def cell():
        @register_form
        class Halves(Plain):
            """Another class of the same name each time."""

        return Halves

    try:
        first, second = cell(), cell()
        assert first is not second and FORMS["Halves"] is second
        forms = [kind(jnp.ones((2, 3), jnp.int8), jnp.ones(2), dtype="float32") for kind in (first, second)]
        for form in forms:
            stored = jax.export.export(jax.jit(lambda form: form.dense()))(form).serialize()
            np.testing.assert_array_equal(jax.export.deserialize(stored).call(form), np.ones((2, 3)))
    finally:
        FORMS.unregister("Halves")
