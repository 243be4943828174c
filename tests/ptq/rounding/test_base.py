"""What every rounding method owes: errors by statistics, dead columns, vmap, meshes, precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lcq
from lcq.ptq.rounding import ROUNDING_METHODS, base
from lcq.ptq.rounding.coordinate_descent import Descent
from lcq.ptq.rounding.gpfq import GPFQ, SparseGPFQ
from lcq.ptq.rounding.qronos import Qronos
from lcq.ptq.rounding.sequential import follow
from lcq.ptq.rounding.spfq import SPFQ
from lcq.ptq.statistics import finish, gather
from tests.ptq.rounding.oracles import SCHEMES, assert_codes, correct, literal, path_error, problem, standard, tables


def test_residual_is_the_norm():
    (w, x, y), statistics = standard()
    form = SCHEMES["grid"].project(jnp.asarray(w))
    direct = path_error(w, x, y, form)
    np.testing.assert_allclose(base.residual(jnp.asarray(w), statistics, form), direct, rtol=1e-5)
    unknown = base.residual(jnp.asarray(w), statistics._replace(difference=None), form)
    missing = (((x.astype(np.float64) - y) @ w) ** 2).sum(0)
    np.testing.assert_allclose(unknown, direct - missing, atol=1e-5 * direct.max())
    same = finish(gather(jnp.asarray(y)))
    np.testing.assert_allclose(base.residual(jnp.asarray(w), same, form), path_error(w, y, y, form), rtol=1e-5)


@pytest.mark.parametrize(
    "method",
    [
        *(ROUNDING_METHODS[name]() for name in ROUNDING_METHODS),
        SparseGPFQ(0.5),
        GPFQ(act_order=True),
        Qronos(act_order=True),
    ],
    ids=lambda method: f"{type(method).__name__}-{getattr(method, 'act_order', '')}",
)
def test_dead_columns_go_to_the_nearest_level(method):
    w, x, y = problem(60, 20, 4)
    x[:, 3] = y[:, 3] = 0
    y[:, 7] = 0
    y[:, 0] = 1e-8
    form = lcq.Uniform(3, per=5).project(jnp.asarray(w))
    for statistics in (
        finish(gather(jnp.asarray(y), jnp.asarray(x), difference=True)),
        finish(gather(jnp.asarray(0 * y), jnp.asarray(0 * x), difference=True), centred=True),
    ):
        got = method.codes(jnp.asarray(w), statistics, form, jax.random.key(0))
        if not isinstance(method, SPFQ | SparseGPFQ):
            dead = np.asarray(jnp.diagonal(statistics.gram)) < 1e-9
            assert dead.sum() in (3, 20)
            scale = np.repeat(np.asarray(got.scale, np.float64), 5, axis=0)  # which descent fits anew
            nearest = np.abs(w[..., None] - scale[..., None] * np.arange(-4.0, 4)).argmin(-1)
            np.testing.assert_array_equal(np.asarray(got.codes)[dead], nearest[dead])
        values = (
            base.residual(jnp.asarray(w), statistics, got),
            correct(jnp.asarray(w), statistics, got),
        )
        assert np.isfinite(np.stack([*values])).all() and int(got.codes.max()) < 8


# Transformations


def test_vmap_over_groups_is_a_loop():
    groups = [problem(50, 9, 3, seed=g) for g in range(3)]
    ws, xs, ys = (jnp.asarray(np.stack(a)) for a in zip(*groups, strict=True))

    def run(w, x, y, key):
        form = lcq.Uniform(3, per="channel").project(w)
        statistics = finish(gather(y, x, difference=True), centred=True)
        forms = [
            method.codes(w, statistics, form, key)
            for method in (SPFQ(), Qronos(), SparseGPFQ(0.5, "hard"), GPFQ(act_order=True))
        ]
        errors = base.residual(w, statistics, forms[1])
        return forms, follow(w, x, y, form), errors

    keys = jax.random.split(jax.random.key(0), 3)
    together = jax.jit(jax.vmap(run))(ws, xs, ys, keys)
    one = jax.jit(run)
    for g in range(3):
        for a, b in zip(jax.tree.leaves(one(ws[g], xs[g], ys[g], keys[g])), jax.tree.leaves(together), strict=True):
            np.testing.assert_allclose(a, b[g], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_batch_on_a_mesh(kind):
    (w, x, y), _ = standard()
    x, y = x[:216], y[:216]
    form = SCHEMES["grid"].project(jnp.asarray(w))
    expected, margins, _ = literal(w, x, y, tables(form, w))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    rows, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    with jax.set_mesh(mesh):
        statistics = jax.jit(lambda y, x: finish(gather(y, x)))(*jax.device_put((y, x), rows))
        got = GPFQ().codes(*jax.device_put((jnp.asarray(w), statistics, form), everywhere))
    assert_codes(got, expected, margins)


def equations(jaxpr):
    """All equations, at any depth."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def programs(size=300):
    """A jaxpr of everything with a product in it."""
    w, y = jnp.zeros((size, 4)), jnp.zeros((600, size))
    form = lcq.Uniform(3).project(w)
    key = jax.random.key(0)
    for method in (
        *(ROUNDING_METHODS[name]() for name in ROUNDING_METHODS),
        SparseGPFQ(0.5),
        SparseGPFQ(0.5, "hard"),
        GPFQ(act_order=True),
        Qronos(1.0, act_order=True),
    ):

        def run(w, x, y, method=method):
            statistics = finish(gather(y, x, difference=True), centred=True)
            new = method.codes(w, statistics, form, key)
            bias = correct(w, statistics, new)
            return new, bias, base.residual(w, statistics, new), follow(w, x, y, form)

        yield jax.make_jaxpr(run)(w, y, y).jaxpr


def test_every_product_is_of_the_highest_precision():
    for program in programs():
        products = [e for e in equations(program) if e.primitive.name == "dot_general"]
        assert len(products) > 4
        for product in products:
            assert set(product.params["precision"]) == {jax.lax.Precision.HIGHEST}, product


def test_program_does_not_grow_with_the_inputs():
    lengths = {tuple(len(list(equations(p))) for p in programs(size)) for size in (1100, 2300)}
    assert len(lengths) == 1


@pytest.mark.parametrize(
    "make", [*(ROUNDING_METHODS[name] for name in ROUNDING_METHODS)], ids=lambda make: make.__name__
)
def test_settings_that_all_methods_have(make):
    plain = make(search=False, shrink=0)
    assert (plain.search, plain.shrink, make().search, make().shrink) == (False, 0, True, None)
    assert plain == make(search=False, shrink=0) != make() and hash(plain) == hash(make(search=False, shrink=0))
    assert str(make()) == f"{make.__name__}()" and str(plain) == f"{make.__name__}(search=False, shrink=0)"
    for shrink in (1.5, -0.1, np.nan):
        with pytest.raises(ValueError, match="expected shrink between 0 and 1, or None to choose it, got"):
            make(shrink=shrink)


def test_the_text_of_a_method_has_what_is_not_as_usual():
    assert str(SparseGPFQ(0.5, search=False)) == "SparseGPFQ(search=False, threshold=0.5)"
    assert str(Descent(GPFQ(act_order=True), 2)) == "Descent(before=GPFQ(act_order=True), sweeps=2)"
