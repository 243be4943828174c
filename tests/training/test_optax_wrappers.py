"""The table of docs/guides/optax_wrappers.md, row by row: what it allows ends compressed, what it forbids does not."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lcq

pytestmark = pytest.mark.filterwarnings("ignore:the weights are", "ignore:nearly all")

GUIDE = (Path(__file__).parents[2] / "docs/guides/optax_wrappers.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("| \n").split("|")]
    for line in re.findall(r"^\|.*\|$", GUIDE, re.MULTILINE)[2:]
]
TABLE = {row[0].replace("`", ""): dict(zip(("inside", "around", "hemp"), row[1:4], strict=True)) for row in ROWS}

RNG = np.random.default_rng(0)
TWO_HEAPS = np.where(np.arange(12) < 5, 1.0, -0.6) + RNG.normal(size=12) / 4
A = jnp.asarray(RNG.normal(size=(30, 12)) / 5, jnp.float32)
START = {"w": jnp.asarray(TWO_HEAPS + RNG.normal(size=12) / 10, jnp.float32).reshape(3, 4), "b": jnp.ones(2)}
B = A @ TWO_HEAPS.astype(np.float32) + jnp.asarray(RNG.normal(size=30) / 5, jnp.float32)
RULES = [lcq.Rule("w", lcq.KMeans(2))]
STEPS = 500


def loss(params):
    return 0.5 * jnp.sum((A @ params["w"].reshape(-1) - B) ** 2) + 0.5 * jnp.sum((params["b"] - 2) ** 2)


def lc(inner, every=(20, 12), **changes):
    return lcq.lc(inner, RULES, mu=lcq.geometric(0.02, 1.3, steps=18), every=every, **changes)


def rate(start, end):
    return optax.exponential_decay(start, STEPS, end / start)


MASK = {"w": True, "b": True}
STILL = {"w": False, "b": True}
SAM = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
LABELS = {"w": "w", "b": "b"}
NAMES = ("inner", "mu", "every", "coupling")


def backtracking():
    return optax.scale_by_backtracking_linesearch(max_backtracking_steps=20)


def zoom():
    return optax.scale_by_zoom_linesearch(max_linesearch_steps=20)


def stored():
    return optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(20, store_grad=True))


def snapshot():
    return optax.snapshot("size", optax.tree.norm)


def private():
    return optax.contrib.differentially_private_aggregate(1e9, 0.0, 0)


def injected(inner=lambda eta: optax.sgd(eta)):
    around = optax.inject_hyperparams(lcq.lc, static_args=NAMES)
    mu = lcq.geometric(0.02, 1.3, steps=18)
    return around(inner, RULES, mu=mu, every=(20, 12), learning_rate=0.25)


SGD = optax.sgd(0.25)
INSIDE = {
    "sgd, adam, adamw": lambda: [
        optax.sgd(0.2, momentum=0.5),
        optax.adam(0.05, b2=0.9),
        optax.adamw(0.05, b2=0.9),
    ],
    "lion, sign_sgd": lambda: [optax.lion(rate(0.02, 0.001), b1=0.5, b2=0.5), optax.sign_sgd(rate(0.02, 0.001))],
    "contrib.muon": lambda: [optax.contrib.muon(rate(0.1, 0.002), beta=0.5)],
    "contrib.prodigy, contrib.dog": lambda: [optax.contrib.prodigy(), optax.contrib.dog()],
    "contrib.mechanize": lambda: [optax.contrib.mechanize(optax.sgd(1.0))],
    "lbfgs": lambda: [optax.lbfgs()],
    "scale_by_backtracking_linesearch": lambda: [optax.chain(optax.sgd(1.0), backtracking())],
    "scale_by_zoom_linesearch": lambda: [optax.chain(optax.sgd(1.0), zoom())],
    "value_and_grad_from_state": lambda: [stored(), optax.lbfgs()],
    "polyak_sgd": lambda: [optax.polyak_sgd(0.25)],
    "contrib.momo, contrib.momo_adam": lambda: [optax.contrib.momo(0.4), optax.contrib.momo_adam(0.05)],
    "contrib.reduce_on_plateau": lambda: [optax.chain(SGD, optax.contrib.reduce_on_plateau(patience=250))],
    "contrib.sophia": lambda: [
        optax.contrib.sophia(0.3, b1=0.5, b2=0.9, gamma=1.0, weight_decay=0.0, update_interval=1)
    ],
    "contrib.sam": lambda: [optax.contrib.sam(SGD, SAM)],
    "contrib.sam, opaque": lambda: [optax.contrib.sam(SGD, SAM, opaque_mode=True)],
    "lookahead": lambda: [optax.lookahead(SGD, 4, 0.5)],
    "contrib.schedule_free": lambda: [optax.contrib.schedule_free(SGD, 0.25)],
    "MultiSteps": lambda: [optax.MultiSteps(SGD, 2).gradient_transformation()],
    "apply_if_finite": lambda: [optax.apply_if_finite(SGD, 3)],
    "masked, partition": lambda: [
        optax.chain(optax.masked(optax.clip(9.0), {"w": True, "b": False}), SGD),
        optax.partition({"w": SGD, "b": SGD}, LABELS),
    ],
    "freeze, selective_transform": lambda: [
        optax.chain(SGD, optax.freeze(STILL)),
        optax.selective_transform(SGD, freeze_mask=STILL),
    ],
    "flatten": lambda: [optax.flatten(SGD)],
    "inject_hyperparams": lambda: [optax.inject_hyperparams(optax.sgd)(0.25)],
    "clip, clip_by_global_norm": lambda: [optax.chain(optax.clip(2.0), optax.clip_by_global_norm(3.0), SGD)],
    "add_decayed_weights": lambda: [optax.chain(optax.add_decayed_weights(1e-3), SGD)],
    "ema, trace": lambda: [optax.chain(optax.ema(0.5), SGD), optax.chain(optax.trace(0.5), optax.sgd(0.2))],
    "contrib.differentially_private_aggregate": lambda: [optax.chain(private(), SGD)],
    "snapshot": lambda: [optax.chain(snapshot(), SGD)],
}
AROUND = {
    "lbfgs": lambda: [optax.chain(lc(optax.identity()), optax.lbfgs())],
    "scale_by_backtracking_linesearch": lambda: [optax.chain(lc(optax.sgd(1.0)), backtracking())],
    "scale_by_zoom_linesearch": lambda: [optax.chain(lc(optax.sgd(1.0)), zoom())],
    "contrib.reduce_on_plateau": lambda: [optax.chain(lc(SGD), optax.contrib.reduce_on_plateau(patience=200))],
    "contrib.sam": lambda: [optax.contrib.sam(lc(SGD, every=(10, 6)), SAM)],
    "contrib.sam, opaque": lambda: [optax.contrib.sam(lc(SGD), SAM, opaque_mode=True)],
    "lookahead": lambda: [optax.lookahead(lc(SGD), 4, 0.5)],
    "contrib.schedule_free": lambda: [optax.contrib.schedule_free(lc(SGD), 0.25)],
    "MultiSteps": lambda: [optax.MultiSteps(lc(SGD, every=(10, 6)), 2)],
    "apply_if_finite": lambda: [optax.apply_if_finite(lc(SGD), 3)],
    "masked, partition": lambda: [
        optax.chain(optax.masked(lc(SGD), {"w": True, "b": False}), optax.masked(SGD, {"w": False, "b": True})),
        optax.partition({"w": lc(SGD), "b": SGD}, LABELS),
    ],
    "freeze, selective_transform": lambda: [
        optax.chain(lc(SGD), optax.freeze(STILL)),
        optax.selective_transform(lc(SGD), freeze_mask=STILL),
    ],
    "flatten": lambda: [optax.flatten(lc(SGD))],
    "inject_hyperparams": lambda: [injected()],
    "clip, clip_by_global_norm": lambda: [optax.chain(optax.clip(2.0), lc(SGD), optax.clip_by_global_norm(3.0))],
    "add_decayed_weights": lambda: [optax.chain(optax.add_decayed_weights(1e-3), lc(SGD))],
    "ema, trace": lambda: [optax.chain(lc(SGD), optax.ema(0.5)), optax.chain(lc(optax.sgd(0.2)), optax.trace(0.5))],
    "incremental_update": lambda: [lc(SGD)],
    "contrib.differentially_private_aggregate": lambda: [optax.chain(private(), lc(SGD))],
    "snapshot": lambda: [optax.chain(lc(SGD), snapshot())],
    "lcq.hemp": lambda: [lcq.hemp(lc(SGD), RULES, order=1, small=0, entropy_weight=0.0, error_weight=0.0)],
}
GIVEN = ("lbfgs", "linesearch", "value_and_grad", "polyak", "momo", "plateau")


def extra_of(name, params, value, grads):
    """What `update` is given beside the gradients, always of the loss alone."""
    if any(word in name for word in GIVEN):
        return {"value": value, "grad": grads, "value_fn": loss}
    if name == "contrib.sophia":
        return {"obj_fn": loss}
    return {"grad_fn": jax.grad(lambda w, _: loss(w))} if name == "contrib.sam, opaque" else {}


def run(tx, name):
    """Parameters, their mean, and the state; a scan, so that no update changes a dtype."""
    wraps = name == "lookahead"
    params = optax.LookaheadParams.init_synced(START) if wraps else START

    def step(carry, _):
        params, mean, state = carry
        here = params.fast if wraps else params
        if name == "value_and_grad_from_state":
            value, grads = optax.value_and_grad_from_state(loss)(here, state=state)
        else:
            value, grads = jax.value_and_grad(loss)(here)
        given = grads
        if "private" in name:
            given = jax.tree.map(lambda g: jnp.stack([g, g]), grads)
        updates, state = tx.update(given, state, params, **extra_of(name, here, value, grads))
        params = optax.apply_updates(params, updates)
        return (params, optax.incremental_update(params, mean, 0.1), state), None

    carry = params, params, tx.init(params)
    (params, mean, state), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=STEPS))(carry)
    return (params.slow, params.slow, state) if wraps else (params, mean, state)


def ends_compressed(tx, name):
    """Whether the weights end beside their Theta, at a loss near that of plain SGD in `lc`."""
    params, mean, state = run(tx, name)
    if name == "incremental_update":
        params = mean
    if name == "contrib.schedule_free":
        nested = [s for s in jax.tree.leaves(state, is_leaf=is_free) if is_free(s)]
        params = optax.contrib.schedule_free_eval_params(nested[0], params)
    forms = lcq.extract(state, params)
    gap = float(lcq.metrics(lcq.training.c_step(state, params))["gap"])
    return gap < 2e-3 and float(loss(lcq.decompress(forms) | {"b": 2 * jnp.ones(2)})) < 1.05 * plain_loss()


def is_free(node):
    return isinstance(node, optax.contrib.ScheduleFreeState)


def plain_loss():
    if not _PLAIN:
        params, _, state = run(lc(SGD), "sgd")
        _PLAIN.append(float(loss(lcq.decompress(lcq.extract(state, params)))))
    return _PLAIN[0]


_PLAIN: list = []


def test_every_row_has_a_case_and_every_case_a_row():
    assert TABLE and all(len(row) == 5 and row[4] for row in ROWS)
    for column, cases in (("inside", INSIDE), ("around", AROUND), ("hemp", INSIDE)):
        said = {name for name, cells in TABLE.items() if cells[column]}
        assert {cells[column] for cells in TABLE.values()} <= {"yes", "no", ""}
        assert said == set(cases), column


@pytest.mark.parametrize(
    "name, column", [(name, c) for name, cells in TABLE.items() for c in ("inside", "around") if cells[c]]
)
def test_what_the_table_allows_ends_compressed_and_nothing_else(name, column):
    every = (20, 24) if "adam" in name else (20, 12)  # Adam follows slowly
    cases = [lc(inner, every) for inner in INSIDE[name]()] if column == "inside" else AROUND[name]()
    for tx in cases:
        if TABLE[name][column] == "yes":
            assert ends_compressed(tx, name)
            continue
        try:
            assert not ends_compressed(tx, name)
        except (ValueError, TypeError, AttributeError) as error:  # or it says so
            assert "expected" in str(error) or "matches no leaf" in str(error) or "Lookahead" in str(error), error


@pytest.mark.parametrize("name", [name for name, cells in TABLE.items() if cells["hemp"]])
def test_hemp_takes_what_needs_the_gradient_alone(name):
    value, grads = jax.value_and_grad(loss)(START)
    for inner in INSIDE[name]():
        tx = lcq.hemp(inner, RULES, order=1, small=0)

        def update(tx=tx):
            return tx.update(grads, tx.init(START), START, **extra_of(name, START, value, grads))

        if TABLE[name]["hemp"] == "yes":
            shapes, _ = jax.eval_shape(update)
            assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, START)
            continue
        with pytest.raises((ValueError, AttributeError)) as caught:
            jax.eval_shape(update)
        if extra_of(name, START, value, grads):
            assert "hemp adds terms" in str(caught.value) and "=" in str(caught.value)
