"""Which leaf goes where, and what is refused."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx

import lcq
from lcq.rules import flatten, resolve

PARAMS = {
    "dense0": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)},
    "dense1": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)},
    "steps": jnp.zeros((), jnp.int32),
}
KERNEL = "(.*/)?kernel"


def test_the_first_rule_that_matches_decides():
    rules = [
        lcq.Rule("dense1/.*", None),
        lcq.Rule(KERNEL, lcq.KMeans(2)),
        lcq.Rule(".*bias", lcq.Cast("bfloat16")),
    ]
    tasks = resolve(rules, PARAMS)
    assert [(task.name, type(task.scheme).__name__) for task in tasks] == [
        ("dense0/bias", "Cast"),
        ("dense0/kernel", "KMeans"),
    ]


def test_a_pattern_matches_the_whole_path():
    with pytest.raises(ValueError, match=r"'kernel' matches no leaf .*: dense\d/kernel"):
        resolve([lcq.Rule("kernel", lcq.KMeans(2))], PARAMS)
    assert len(resolve([lcq.Rule(KERNEL, lcq.KMeans(2))], {"kernel": jnp.ones(3)})) == 1


def test_a_shadowed_rule_is_an_error():
    rules = [lcq.Rule(KERNEL, lcq.KMeans(2)), lcq.Rule("dense0/kernel", lcq.KMeans(4))]
    with pytest.raises(ValueError, match="earlier rules take dense0/kernel"):
        resolve(rules, PARAMS)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (lambda: lcq.Rule("steps", lcq.KMeans(2)), r"steps: .*floating-point array; got int32\[\]; exclude it"),
        (lambda: lcq.Rule(".*bias", lcq.Ternary(per=2)), "dense0/bias: per=2 needs at least 2 axes"),
        (lambda: lcq.Rule(KERNEL, lcq.Ternary(per=2)), "dense1/kernel: per=2 cuts axis 0"),
        (lambda: lcq.Rule(".*bias", lcq.KMeans(2), stacked=2), "dense0/bias: .*2 stacked axes"),
        (lambda: lcq.Rule(KERNEL, lcq.KMeans(2), joint=True, stacked=1), "must agree"),
        (lambda: lcq.Rule("(", lcq.KMeans(2)), "regular expression"),
        (lambda: lcq.Rule("a", lcq.KMeans(2), stacked=-1), "stacked >= 0"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_leaf(rule, words):
    with pytest.raises(ValueError, match=words):
        resolve([rule()], PARAMS)


def test_arguments_of_other_types_are_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=r"wanted a scheme"):
        lcq.Rule("a", 4)
    with pytest.raises(ValueError, match="wanted rules"):
        resolve(["kernel"], PARAMS)


def test_empty_leaves_and_trees_are_refused():
    with pytest.raises(ValueError, match=r"w: .*at least one weight"):
        resolve([lcq.Rule("w", lcq.KMeans(2))], {"w": jnp.ones((0, 3))})
    with pytest.raises(ValueError, match="the tree is empty"):
        resolve([lcq.Rule("w", lcq.KMeans(2))], {})


def test_paths_are_the_same_bare_and_inside_nnx_variables():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    assert list(flatten(state)[0]) == list(flatten(nnx.to_pure_dict(state))[0]) == ["bias", "kernel"]


def test_two_leaves_with_one_path_are_refused():
    with pytest.raises(ValueError, match="a/b: two leaves"):
        flatten({"a/b": 1.0, "a": {"b": 2.0}})


def test_sequences_and_attributes_have_paths():
    assert list(flatten([{"w": 1.0}, (2.0, 3.0)])[0]) == ["0/w", "1/0", "1/1"]


def test_stacked_axes_are_independent():
    x = jnp.stack([jnp.arange(6.0).reshape(2, 3), 100 * jnp.arange(6.0).reshape(2, 3)])
    for scheme in (lcq.KMeans(2), lcq.KMeans(2, exact=True), lcq.Ternary(per="channel")):
        forms = lcq.compress({"w": x}, [lcq.Rule("w", scheme, stacked=1)])["w"]
        for i in range(2):
            alone = scheme.project(x[i])
            assert jnp.allclose(forms.dense()[i], alone.dense())
            assert jnp.array_equal(jax.tree.map(lambda a, i=i: a[i], forms).dense(), forms.dense()[i])


@pytest.mark.parametrize(
    "scheme", [lcq.KMeans(2), lcq.KMeans(2, exact=True), lcq.Ternary(per="channel"), lcq.Cast()], ids=str
)
def test_weights_of_stacked_leaves(scheme):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, 4, 2)), jnp.float32)
    h = jnp.asarray(np.random.default_rng(1).lognormal(sigma=2, size=(2, 2, 4, 1)), jnp.float32)
    (task,) = resolve([lcq.Rule("w", scheme, stacked=2)], {"w": x})
    (plain,) = task.project((x,))
    for weights in (h, h[0, 0], h[:, :1]):
        (form,) = task.project((x,), weights=(weights,))
        (warm,) = task.project((x,), (plain,), weights=(weights,))
        full = jnp.broadcast_to(weights, x.shape)
        for i, j in [(0, 1), (1, 0)]:
            alone = scheme.project(x[i, j], weights=full[i, j])
            assert jnp.allclose(form.dense()[i, j], alone.dense(), rtol=1e-5)
            assert (full[i, j] * (warm.dense() - x)[i, j] ** 2).sum() <= 1.00001 * (
                full[i, j] * (plain.dense() - x)[i, j] ** 2
            ).sum()


def test_weights_of_joint_leaves():
    xs = tuple(PARAMS[layer]["kernel"] * jnp.arange(PARAMS[layer]["kernel"].shape[1]) for layer in ("dense0", "dense1"))
    (task,) = resolve([lcq.Rule(KERNEL, lcq.KMeans(1), joint=True)], PARAMS)
    forms = task.project(xs, weights=(jnp.asarray([[1.0], [0], [0], [3]]), jnp.asarray([5.0, 0])))
    assert [form.levels.ravel().tolist() for form in forms] == [[pytest.approx(12 / 27)]] * 2
    with pytest.raises(ValueError, match=r"dense0/kernel, dense1/kernel: weights: wanted a tuple of 2 arrays; got 1"):
        task.project(xs, weights=(jnp.ones(3),))
    with pytest.raises(
        ValueError, match=r"dense0/kernel, dense1/kernel: weights: .* broadcasts to \[3, 2\]; got \[3\]"
    ):
        task.project(xs, weights=(jnp.ones(3), jnp.ones(3)))
    with pytest.raises(ValueError, match=r"weights: wanted finite numbers >= 0"):
        task.project(xs, weights=(jnp.ones(3), -jnp.ones(2)))


def test_a_joint_task_is_one_task():
    (task,) = resolve([lcq.Rule(KERNEL, lcq.KMeans(2), joint=True)], PARAMS)
    assert task.paths == ("dense0/kernel", "dense1/kernel")
