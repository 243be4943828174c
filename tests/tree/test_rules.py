"""Which leaf goes where, and what is refused."""

import re

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
from flax import nnx

import lcq
from lcq.schemes.grouped import cut
from lcq.tree.paths import flatten
from lcq.tree.rules import resolve

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
        (lambda: lcq.Rule("steps", lcq.KMeans(2)), r"steps: .*floating-point array, got int32\[\]; exclude it"),
        (lambda: lcq.Rule(".*bias", lcq.Ternary(per=2)), "dense0/bias: per=2 needs at least 2 axes"),
        (lambda: lcq.Rule(KERNEL, lcq.Ternary(per=2)), "dense1/kernel: per=2 cuts axis 0"),
        (lambda: lcq.Rule(".*bias", lcq.KMeans(2), stacked=2), "dense0/bias: .*2 stacked axes"),
        (lambda: lcq.Rule(KERNEL, lcq.KMeans(2), joint=True, stacked=1), "must agree"),
        (lambda: lcq.Rule("(", lcq.KMeans(2)), "regular expression"),
        (lambda: lcq.Rule("*kernel", lcq.KMeans(2)), r"'\.\*' stands for any characters"),
        (lambda: lcq.Rule("a", lcq.KMeans(2), stacked=-1), "stacked >= 0"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_leaf(rule, words):
    with pytest.raises(ValueError, match=words):
        resolve([rule()], PARAMS)


def test_arguments_of_other_types_are_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=r"expected a scheme"):
        lcq.Rule("a", 4)
    with pytest.raises(ValueError, match="expected rules"):
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
def test_importance_of_stacked_leaves(scheme):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, 4, 2)), jnp.float32)
    h = jnp.asarray(np.random.default_rng(1).lognormal(sigma=2, size=(2, 2, 4, 1)), jnp.float32)
    (task,) = resolve([lcq.Rule("w", scheme, stacked=2)], {"w": x})
    (plain,) = task.project((x,))
    for importance in (h, h[0, 0], h[:, :1]):
        (form,) = task.project((x,), importance=(importance,))
        (warm,) = task.project((x,), (plain,), importance=(importance,))
        full = jnp.broadcast_to(importance, x.shape)
        for i, j in [(0, 1), (1, 0)]:
            alone = scheme.project(x[i, j], importance=full[i, j])
            assert jnp.allclose(form.dense()[i, j], alone.dense(), rtol=1e-5)
            assert (full[i, j] * (warm.dense() - x)[i, j] ** 2).sum() <= 1.00001 * (
                full[i, j] * (plain.dense() - x)[i, j] ** 2
            ).sum()


def test_importance_of_joint_leaves():
    xs = tuple(PARAMS[layer]["kernel"] * jnp.arange(PARAMS[layer]["kernel"].shape[1]) for layer in ("dense0", "dense1"))
    (task,) = resolve([lcq.Rule(KERNEL, lcq.KMeans(1), joint=True)], PARAMS)
    forms = task.project(xs, importance=(jnp.asarray([[1.0], [0], [0], [3]]), jnp.asarray([5.0, 0])))
    assert [form.levels.ravel().tolist() for form in forms] == [[pytest.approx(12 / 27)]] * 2
    with pytest.raises(
        ValueError, match=r"dense0/kernel, dense1/kernel: importance: expected a tuple of 2 arrays, got 1"
    ):
        task.project(xs, importance=(jnp.ones(3),))
    with pytest.raises(
        ValueError, match=r"dense0/kernel, dense1/kernel: importance: .* broadcasts to \[3, 2\], got \[3\]"
    ):
        task.project(xs, importance=(jnp.ones(3), jnp.ones(3)))
    with pytest.raises(ValueError, match=r"importance: expected finite numbers >= 0"):
        task.project(xs, importance=(jnp.ones(3), -jnp.ones(2)))


def test_a_joint_task_is_one_task():
    (task,) = resolve([lcq.Rule(KERNEL, lcq.KMeans(2), joint=True)], PARAMS)
    assert task.paths == ("dense0/kernel", "dense1/kernel")


# What is no rule, and no leaf for one

SCHEME = lcq.KMeans(2)
WEIGHTS = {"k": jnp.arange(32.0).reshape(8, 4)}
RULE = lcq.Rule("k", SCHEME)


def product(p, x):
    return x @ p["k"]


TAKE_RULES = {  # every public function of parameters and rules
    "compress": lcq.compress,
    "dry_run": lcq.dry_run,
    "lc": lambda p, rules: lcq.lc(optax.sgd(0.1), rules, mu=0.1, every=2).init(p),
    "hemp": lambda p, rules: lcq.hemp(optax.sgd(0.1), rules).init(p),
    "smooth_binary": lambda p, rules: lcq.smooth_binary(rules).compress(p),
    "iterated_direct": lambda p, rules: lcq.training.iterated_direct(optax.sgd(0.1), rules, every=2).init(p),
    "straight_through_training": lambda p, rules: lcq.training.straight_through_training(optax.sgd(0.1), rules).init(p),
    "quantize": lambda p, rules: lcq.quantize(product, p, [jnp.ones((4, 8))], rules),
    "quantize, rtn": lambda p, rules: lcq.quantize(product, p, [jnp.ones((4, 8))], [], rtn=rules),
    "curvature": lambda p, rules: lcq.ptq.curvature(lambda p, x: product(p, x).sum(), p, [jnp.ones((4, 8))], rules),
    "Plan": lambda p, rules: lcq.Plan(rules),
}

NO_RULES = {
    "one rule": (RULE, r"got one rule, Rule\(.*put it into brackets: \[rule\]"),
    "a scheme": (SCHEME, r"got the scheme KMeans.*\[lcq.Rule\('\.\*', scheme\)\]"),
    "a dict": ({"k": SCHEME}, r"got a dict; write \[lcq.Rule\(pattern, scheme\) for"),
    "text": ("k=KMeans(2)", r"got 'k=KMeans\(2\)'; make"),
    "nothing": (None, r"got None; make"),
    "pairs": ([("k", SCHEME)], r"got \('k', KMeans.*; make lcq.Rule\(pattern, scheme\) of it"),
    "schemes": ([SCHEME], r"got KMeans.*; make lcq.Rule\(pattern, scheme\) of it"),
}


@pytest.mark.parametrize("take", TAKE_RULES)
@pytest.mark.parametrize("case", NO_RULES)
def test_rules_that_are_no_list(monkeypatch, take, case):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    rules, complaint = NO_RULES[case]
    with pytest.raises(ValueError, match=f"^expected .*rules.*{complaint}"):
        TAKE_RULES[take](WEIGHTS, rules)


@pytest.mark.parametrize("take", ["compress", "lc", "hemp", "quantize", "Plan"])
def test_rules_that_can_be_seen_once(monkeypatch, take):
    """A generator is a list of rules, too, whoever looks at it how often."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    scheme = lcq.Uniform(4) if take == "quantize" else SCHEME
    assert TAKE_RULES[take](WEIGHTS, (rule for rule in [lcq.Rule("k", scheme)])) is not None


NO_LEAVES = {  # a leaf beside k that the rule takes, too, and what is said of it
    "a function": (jax.nn.relu, r"b: rule '.*' wants a floating-point array, got \w+; exclude it with"),
    "text": ("relu", r"b: .* got str; exclude it with"),
    "a number": (2.0, r"b: .* got float; exclude it with"),
    "integers": (jnp.arange(3), r"b: .* got int32\[3\]; exclude it with"),
    "empty": (
        jnp.zeros((0, 4)),
        r"b: .* wants at least one weight, got float32\[0, 4\], an empty leaf; exclude it with",
    ),
    "a form": (
        lcq.Binary().project(jnp.ones(4)),
        r"b: .* got a form, Codes, .*; make it dense with lcq.decompress",
    ),
}


@pytest.mark.parametrize("take", sorted({*TAKE_RULES} - {"Plan"}))
@pytest.mark.parametrize("case", NO_LEAVES)
def test_leaves_that_no_rule_can_take(take, case):
    """Said by name, and the remedy is as it would be written."""
    leaf, complaint = NO_LEAVES[case]
    params = WEIGHTS | {"b": leaf}
    scheme = lcq.Binary() if take == "smooth_binary" else lcq.Uniform(4)
    if case == "a form" and take.startswith(("quantize", "curvature")):
        return  # stays as it is
    if take.startswith("quantize") and not isinstance(leaf, jax.Array | float):  # no rule is needed to refuse it
        with pytest.raises(ValueError, match=r"^b: expected an array, a form or a number, got .*; leave it out"):
            TAKE_RULES[take](params, [lcq.Rule(".*", scheme)])
        return
    with pytest.raises(ValueError, match=complaint) as error:
        TAKE_RULES[take](params, [lcq.Rule(".*", scheme)])
    spelt = re.search(r"exclude it with (lcq\.Rule\(.*?, None\))", str(error.value))[1]
    assert eval(spelt, {"lcq": lcq}) == lcq.Rule("b", None)


def test_leaves_that_are_no_arrays():
    """Where they would be traced or counted; `compress` leaves alone what no rule selects."""
    rules = [lcq.Rule("k", lcq.Uniform(4))]
    for other in (jax.nn.relu, "relu", np.array(["a"])):
        params = WEIGHTS | {"act": other}
        forms = lcq.compress(params, rules)
        assert forms["act"] is other
        calls = [lambda f=TAKE_RULES[name], p=params: f(p, rules) for name in ("quantize", "curvature", "dry_run")]
        calls += [lambda f=f, t=forms: f(t) for f in (lcq.table, lcq.sizes, lcq.ratio)]
        calls += [lambda p=params: lcq.pareto(p, {"k": [lcq.KMeans(2)]}, bytes=1000)]
        for call in calls:
            with pytest.raises(ValueError, match=r"^act: expected an array, a form or a number, got .*; leave it out"):
                call()
    keyed = WEIGHTS | {"key": jax.random.key(0)}
    assert lcq.table(keyed).total.bits == 32 * 32 + 64
    assert lcq.table(lcq.compress(keyed, rules), keyed).total.distortion > 0


def test_a_tree_that_is_one_leaf():
    w = WEIGHTS["k"]
    assert lcq.compress(w, [lcq.Rule(".*", SCHEME)]).shape == (8, 4)
    for take in ("compress", "dry_run", "lc", "quantize"):
        with pytest.raises(ValueError, match=r"rule 'k' matches no leaf: params is one leaf, .*\{'kernel': params\}"):
            TAKE_RULES[take](w, [lcq.Rule("k", lcq.Uniform(4))])
    with pytest.raises(ValueError, match=r"^params, which is one leaf without a name: rule .* got int32"):
        lcq.compress(jnp.arange(3), [lcq.Rule(".*", SCHEME)])


def test_leaves_that_are_none():
    for take in ("compress", "dry_run", "lc", "quantize"):
        with pytest.raises(ValueError, match=r"rule 'a/b' decides no leaf: a/b is None, without weights; drop"):
            TAKE_RULES[take](WEIGHTS | {"a": {"b": None}}, [lcq.Rule("k", lcq.Uniform(4)), lcq.Rule("a/b", SCHEME)])
    assert "a" in lcq.compress(WEIGHTS | {"a": None}, [RULE])
    for nothing in (None, {}, {"a": None}):
        with pytest.raises(ValueError, match=r"the tree is empty|is None"):
            lcq.compress(nothing, [lcq.Rule("a", SCHEME)])
        with pytest.raises(ValueError, match="expected a tree with at least one number, got none"):
            lcq.ratio(nothing)


def test_runs_that_do_not_divide():
    w = {"a": {"k": jnp.ones((6, 4))}}
    for layout, m in ((None, 4), ("oi", 3)):
        with pytest.raises(
            ValueError, match=rf"^a/k: NofM\(1, {m}\) wants an input axis, .* that {m} divides, got \(6, 4\)"
        ):
            lcq.compress(w, [lcq.Rule("a/k", lcq.NofM(1, m), layout=layout)])
    with pytest.raises(
        ValueError, match=r"an m that does, such as NofM\(2, 6\), .* change rule .*, or exclude it with lcq"
    ):
        lcq.compress(w, [lcq.Rule("a/k", lcq.NofM(2, 4))])
    with pytest.raises(ValueError, match=r"^a/k: NofM\(2, 4\) wants an input axis"):
        lcq.compress({"a": {"k": jnp.ones(8)}}, [lcq.Rule("a/k", lcq.NofM(2, 4))])


def test_settings_of_a_rule_that_are_none(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match="expected a regular expression, got 3; write it as a string"):
        lcq.Rule(3, SCHEME)
    for stacked in ("1", True, -1, 1.5):
        with pytest.raises(ValueError, match=r"rule 'k': expected stacked >= 0, got"):
            lcq.Rule("k", SCHEME, stacked=stacked)


@pytest.mark.parametrize("candidates", [[RULE], RULE, SCHEME, None, {"k": SCHEME}, {"k": []}, {"k": ["KMeans(2)"]}])
def test_candidates_that_are_none(monkeypatch, candidates):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=r"^expected candidates by pattern|^'k': expected a list of schemes"):
        lcq.pareto(WEIGHTS, candidates, bytes=1000)


def test_arrays_of_no_numbers_on_forms():
    params = lcq.compress(WEIGHTS, [RULE]) | {"words": np.array(["a"])}
    with pytest.raises(ValueError, match=r"^params/words: expected an array, a form or a number, got ndarray"):
        lcq.packed(product)(params, jnp.ones((2, 8)))


class Faulty(lcq.KMeans):
    """Broadcasts what does not fit in its solve, or finds a fault of lcq's own there."""

    def solve(self, xs, previous, mu, importance=None):
        if self.k == 3:
            return self.fit(cut(xs, None), None)
        return jnp.broadcast_to(jnp.ones(3), (4,))


@pytest.mark.parametrize("stacked", [0, 1])
def test_errors_of_jax_are_not_dressed_as_faults_of_a_leaf(stacked):
    w = {"some/kernel": jnp.ones((2, 8))}
    with pytest.raises(ValueError, match="broadcasting") as caught:
        lcq.compress(w, [lcq.Rule(".*", Faulty(4), stacked=stacked)])
    assert "some/kernel" not in str(caught.value)
    with pytest.raises(ValueError, match=r"^some/kernel: .*drop rate="):
        lcq.compress(w, [lcq.Rule(".*", Faulty(3, rate=0.1), stacked=stacked)])


def test_errors_that_jax_raises_at_a_line_of_lcq_keep_their_words(monkeypatch):
    """JAX's own frames being cut out of it, the traceback ends in lcq."""
    code = (
        "import jax.numpy as jnp\ndef solve(self, xs, previous, mu, importance=None): jnp.broadcast_to(xs[0], (2, 5))"
    )
    space = {"__name__": "lcq.schemes.faulty"}
    exec(code, space)
    monkeypatch.setattr(Faulty, "solve", space["solve"])
    with pytest.raises(ValueError, match="broadcasting") as caught:
        lcq.compress({"some/kernel": jnp.ones((2, 7))}, [lcq.Rule(".*", Faulty(4))])
    assert "some/kernel" not in str(caught.value)
