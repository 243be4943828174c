"""Plans as values, as TOML and in files; the dry run."""

import dataclasses
import tomllib

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
from hypothesis import example, given

import lcq
from lcq.plans.dry_run import dry_run
from lcq.plans.plan import Plan, parse_plan, read_plan
from lcq.schemes import SCHEMES
from lcq.schemes.base import Scheme

# Schemes built inside strategies are checked by beartype, which draws at random what it looks at.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module")


@dataclasses.dataclass(frozen=True)
class Own(Scheme):
    """A scheme of a user's own."""

    def check(self, shape):
        del shape

    def solve(self, xs, previous, mu):
        return lcq.Cast().solve(xs, previous, mu)


RULES = [
    lcq.Rule("head/.*", None),
    lcq.Rule("block/kernel", lcq.KMeans(4, per="channel"), stacked=1),
    lcq.Rule("(a|b)/kernel", lcq.KMeans(3), joint=True),
    lcq.Rule("c/kernel", lcq.Uniform(4, per=4, zero_point=True)),
    lcq.Rule("d/kernel", Own()),
    lcq.Rule("(.*/)?bias", lcq.Cast("float16")),
]


def params():
    rng = np.random.default_rng(0)
    shapes = {"head": (4, 2), "block": (2, 8, 4), "a": (8, 4), "b": (5,), "c": (8, 4), "d": (3, 3)}
    tree = {name: {"kernel": jnp.asarray(rng.normal(size=s), jnp.float32)} for name, s in shapes.items()}
    return tree | {"bias": jnp.ones(7), "count": jnp.arange(3)}


def test_dry_run_is_what_compress_costs():
    tree = params()
    planned, real = dry_run(tree, RULES), lcq.table(lcq.compress(tree, RULES))
    assert [(r.path, r.shape, r.form, r.bits) for r in planned.rows] == [
        (r.path, r.shape, r.form, r.bits) for r in real.rows
    ]
    assert (
        planned.total.bits
        == real.total.bits
        == sum(size.bits for size in lcq.sizes(lcq.compress(tree, RULES)).values())
    )
    asked = {row.path: (row.rule, row.scheme) for row in planned.rows}
    assert asked["head/kernel"] == ("head/.*", "None")
    assert asked["block/kernel"] == ("block/kernel", "KMeans(4, per='channel'); stacked=1")
    assert asked["b/kernel"] == ("(a|b)/kernel", "KMeans(3); joint")
    assert asked["d/kernel"] == ("d/kernel", "Own()")
    assert asked["count"] == (None, None)
    assert all(words in str(planned) for words in ("rule", "(a|b)/kernel", "KMeans(3); joint"))


def test_dry_run_of_exact_schemes_and_shape_structs():
    shapes = {
        "w": jax.ShapeDtypeStruct((1 << 16, 1 << 12), jnp.bfloat16),
        "v": jax.ShapeDtypeStruct((64,), jnp.float32),
    }
    rules = [lcq.Rule("w", lcq.KMeans(16, exact=True)), lcq.Rule("v", lcq.Levels((0, 1), scale=True, exact=True))]
    v, w = dry_run(shapes, rules).rows
    assert w.bits == 4 * 2**28 + 16 * 32 and v.bits == 64 + 32


def test_dry_run_checks_the_rules():
    with pytest.raises(ValueError, match="nearest of"):
        dry_run(params(), [lcq.Rule("kernle", lcq.KMeans(2))])


@dataclasses.dataclass(frozen=True, init=False)
class Total(Own):
    """A scheme of schemes, solved on the host if one of them is."""

    parts: tuple[Scheme, ...]

    def __init__(self, *parts):
        object.__setattr__(self, "parts", parts)

    @property
    def host(self):
        return any(part.host for part in self.parts)

    def solve(self, xs, previous, mu):
        return self.parts[0].solve(xs, previous, mu)


def test_dry_run_of_exact_schemes_inside_others():
    scheme = Total(lcq.KMeans(4, exact=True), lcq.Binary())
    (row,) = dry_run({"w": jax.ShapeDtypeStruct((64,), jnp.float32)}, [lcq.Rule("w", scheme)]).rows
    assert row.bits == 2 * 64 + 4 * 32


# Plans

PLAN = lcq.Plan(RULES[:4])


def compiles(pattern):
    try:
        lcq.Rule(pattern, None)
    except ValueError:
        return False
    return True


odd = st.text(
    st.one_of(st.sampled_from("'\"\\\n\r\t\x00\x1f\x7f\x85\u2028\ufeff#[]=é😀"), st.characters(codec="utf-8"))
)
patterns = st.one_of(odd.filter(compiles), odd.map(lambda s: s.replace("\\", "/")).filter(compiles))
rules = st.builds(
    lcq.Rule,
    patterns,
    st.sampled_from([None, lcq.KMeans(4, per="channel"), lcq.Levels((-0.5, 1e-30)), lcq.Cast("float16")]),
    joint=st.booleans(),
    stacked=st.integers(0, 10**6),
)


@given(st.lists(rules, max_size=5))
@example([lcq.Rule("'", None), lcq.Rule('"', None), lcq.Rule("'''\"\"\"\\\\", None), lcq.Rule("\r\n", None)])
def test_text_of_a_plan_reads_back(some):
    plan = lcq.Plan(some)
    text = str(plan)
    assert parse_plan(text) == plan and hash(parse_plan(text)) == hash(plan)
    assert all(c == "\n" or c.isprintable() for c in text)
    tables = tomllib.loads(text)["rule"]
    assert [t["pattern"] for t in tables] == [rule.pattern for rule in some]


def test_a_plan_is_a_sequence_of_rules_and_a_value():
    assert list(PLAN) == RULES[:4] == [*PLAN[:2], PLAN[2], PLAN[-1]]
    assert isinstance(PLAN[1:], lcq.Plan) and len(PLAN[1:]) == 3 and RULES[0] in PLAN
    assert lcq.Plan(tuple(RULES[:4])) == PLAN == lcq.Plan(PLAN) and len({PLAN, lcq.Plan(PLAN)}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        PLAN.rules = ()


def test_what_is_no_rule_is_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match="expected rules such as"):
        lcq.Plan(["w=Binary"])


@pytest.mark.filterwarnings("ignore:the weights are:UserWarning")
def test_a_plan_goes_wherever_rules_go():
    tree = {k: v for k, v in params().items() if k != "d"}
    same = [lcq.compress(tree, each) for each in (PLAN, list(PLAN))]
    jax.tree.map(np.testing.assert_array_equal, *same)
    assert dry_run(tree, PLAN) == dry_run(tree, list(PLAN))
    state = lcq.lc(optax.sgd(0.1), PLAN, mu=1.0, every=1).init(tree)
    jax.tree.map(np.testing.assert_array_equal, lcq.decompress(lcq.extract(state, tree)), lcq.decompress(same[0]))
    w, plan = {"w": jnp.ones((4, 2))}, lcq.Plan([lcq.Rule("w", lcq.Binary())])
    assert lcq.quantize(lambda p, x: x @ p["w"], w, [jnp.ones((3, 4))], plan).forms["w"].size_of_table == 2


def test_the_text_is_what_one_would_write():
    plan = lcq.Plan([lcq.Rule(r"(.*/)?\d+", lcq.Levels((1, 2)), joint=True), lcq.Rule("it's\t", None, stacked=2)])
    assert str(plan) == (
        "[[rule]]\npattern = '(.*/)?\\d+'\nscheme = \"Levels((1, 2))\"\njoint = true\n\n"
        '[[rule]]\npattern = "it\'s\\U00000009"\nscheme = "None"\nstacked = 2'
    )
    assert parse_plan(str(lcq.Plan([]))) == lcq.Plan([])


def test_a_plan_without_a_text():
    with pytest.raises(ValueError, match="known schemes"):
        str(lcq.Plan([lcq.Rule("w", Own())]))
    with pytest.raises(ValueError, match="surrogate"):
        str(lcq.Plan([lcq.Rule("\ud800", None)]))


def test_hand_written_toml(tmp_path):
    path = tmp_path / "plan.TOML"
    path.write_text(
        "# by hand\n[[rule]]\nscheme = \"kmeans(k=4)\" # four\npattern = '''a'''\njoint = false\n"
        '[[rule]]\npattern="b\\u00e9"\nscheme=" none "\n',
        encoding="utf-8",
    )
    assert read_plan(path) == lcq.Plan([lcq.Rule("a", lcq.KMeans(4)), lcq.Rule("bé", None)]) == read_plan(str(path))


GOOD = "[[rule]]\npattern = 'a'\nscheme = 'Binary'\n"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "expected [[rule]] tables with a pattern and a scheme, and nothing else, got nothing"),
        ("rules = []", "got 'rules'"),
        ("rule = 3", "got 'rule'"),
        (GOOD + "[more]", "got 'rule', 'more'"),
        ("[[rule]\n", "expected TOML; "),
        ("[[rule]]\npattern = 'a'\npattern = 'b'\n", "expected TOML; "),
        ("a = " + "[" * 100_000, "expected TOML; "),
        (b"\xff", "expected a plan in TOML, or an .lcq file that has one, got no text"),
        ("rule = [3]", "rule 1: expected a table, got 3"),
        (GOOD + "[[rule]]\nscheme = 'Binary'", "rule 2: expected pattern: str, got none"),
        (GOOD + "[[rule]]\npattern = 'a'", "rule 2: expected scheme: str, got none"),
        ("[[rule]]\npattern = 3\nscheme = 'Binary'", "rule 1: expected pattern: str, got 3"),
        ("[[rule]]\npattern = 'a'\nscheme = ['Binary']", "rule 1: expected scheme: str, got ['Binary']"),
        (GOOD + "joint = 1", "rule 1: expected joint: bool, got 1"),
        (GOOD + "stacked = true", "rule 1: expected stacked: int, got True"),
        (GOOD + "stacked = 1.0", "rule 1: expected stacked: int, got 1.0"),
        (GOOD + "stacked = -1", "rule 1: rule 'a': expected stacked >= 0, got -1"),
        (GOOD + "stakced = 1", "rule 1: expected only pattern, scheme, joint, stacked, layout, got 'stakced'"),
        (GOOD + GOOD.replace("Binary", "Bniary"), "rule 2: expected a scheme, got 'Bniary'; known schemes: "),
        (GOOD + GOOD.replace("Binary", "Binary(per=0)").replace("'a'", "'('"), "rule 2: expected a regular expression"),
        (GOOD.replace("'a'", "'a{99999999999}'"), "rule 1: "),
        (GOOD.replace("'a'", "'" + "(" * 50_000 + "a" + ")" * 50_000 + "'"), "rule 1: "),
        (GOOD.replace("Binary", '__import__("os").getpid()'), "rule 1: expected a scheme"),
    ],
)
def test_a_plan_that_is_none(tmp_path, text, complaint):
    path = tmp_path / "plan.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=r"(?s).*") as caught:
        read_plan(path)
    assert str(caught.value).startswith(f"{path}: ") and complaint in str(caught.value)


def test_a_plan_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "plan.toml"
    path.write_text("[[rule]]\npattern = 'w'\nscheme = 'Uniform(4)'", "utf-8-sig")
    assert read_plan(path) == read_plan("[[rule]]\npattern = 'w'\nscheme = 'Uniform(4)'")


def test_a_plan_in_a_file(tmp_path):
    path, tree = tmp_path / "net.LCQ", {k: v for k, v in params().items() if k != "d"}
    lcq.save(path, lcq.compress(tree, PLAN), plan=PLAN)
    assert read_plan(path) == PLAN
    again = tmp_path / "again.lcq"
    lcq.save(again, lcq.compress(tree, read_plan(path)), plan=read_plan(path))
    assert again.read_bytes() == path.read_bytes()
    lcq.save(path, tree)
    with pytest.raises(ValueError, match=r"net.LCQ: expected a plan in the file; it has none"):
        read_plan(path)
    lcq.save(path, tree, plan="[[rule]]\npattern='w'\nscheme='Newer(3)'")
    with pytest.raises(ValueError, match=r"net.LCQ: rule 1: expected a scheme, got 'Newer\(3\)'"):
        read_plan(path)
    lcq.save(path, tree, plan="[[rule]]\npattern='w'\nscheme='Prune(0.1, older=2)'")
    with pytest.raises(ValueError, match=r"net.LCQ: rule 1: .* unexpected keyword argument 'older'; expected Prune\("):
        read_plan(path)
    assert lcq.load(path).keys() == tree.keys()
    path.write_bytes(b"no such thing")
    with pytest.raises(lcq.ArtifactError, match=r"net.LCQ: not an lcq file"):
        read_plan(path)
    with pytest.raises(FileNotFoundError):
        read_plan(tmp_path / "gone.toml")


@pytest.fixture
def total():
    SCHEMES.register("Total")(Total)
    yield
    SCHEMES.unregister("Total")


def test_nested_schemes_in_a_plan(total):
    plan = lcq.Plan([lcq.Rule("w", Total(lcq.KMeans(2, per="channel"), Total(lcq.Binary())))])
    assert parse_plan(str(plan)) == plan and "Total(KMeans(2, per='channel'), Total(Binary()))" in str(plan)


# Previews of `quantize`


def heads(p, x):
    y = jnp.einsum("bi,ihd->bhd", x, p["q"])
    return jnp.einsum("bhd,hdo->bo", jnp.tanh(y), p["out"])


def stack(p, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["layers"])[0] @ p["head"].T


def filters(p, x):
    image = x.reshape(-1, 2, 2, 2)
    return jax.lax.conv_general_dilated(image, p["k"], (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW"))


def experts(p, x):
    return jnp.einsum("ebd,edf->ebf", jnp.stack([x, x + 1]), p["w"]).sum(0) @ p["v"]


def slices(p, x):
    a, b = jnp.split(p["w"], [3], 1)
    return (x @ a).sum() + x @ b + p["table"][0, :5]


PREVIEWS = {
    "heads": (heads, {"q": (8, 2, 4), "out": (2, 4, 6)}, {}),
    "stack": (stack, {"layers": (3, 8, 8), "head": (4, 8)}, {}),
    "filters": (filters, {"k": (4, 2, 2, 2)}, {}),
    "experts": (experts, {"w": (2, 8, 4), "v": (4, 4)}, {"stacked": 1}),
    "slices": (slices, {"w": (8, 8), "table": (4, 8)}, {}),
}


@pytest.mark.parametrize("per", [None, "channel", 4])
@pytest.mark.parametrize("case", PREVIEWS)
@pytest.mark.filterwarnings("ignore:.*without stacked:UserWarning")
def test_dry_run_with_a_function_is_what_quantize_costs(case, per):
    fn, shapes, settings = PREVIEWS[case]
    rng = np.random.default_rng(0)
    tree = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    batch = jnp.asarray(rng.normal(size=(5, 8)), jnp.float32)
    scheme = lcq.Uniform(3, per=per, zero_point=case == "slices")
    rules = [lcq.Rule("w|layers", scheme, **settings), lcq.Rule(".*", scheme)] if "stacked" in settings else []
    rules = rules or [lcq.Rule(".*", scheme)]
    near = [lcq.Rule("table", lcq.Uniform(4, per="channel"))] if "table" in shapes else []
    structs = jax.eval_shape(lambda: (tree, batch))
    planned = dry_run(structs[0], rules, fn, structs[1], rtn=near)
    done = lcq.quantize(fn, tree, [batch], rules, lcq.ptq.RTN(search=False), rtn=near, bias_correction=False)
    real = lcq.table(done.forms)
    assert [(r.path, r.shape, r.form, r.bits, r.blocks) for r in planned.rows] == [
        (r.path, r.shape, r.form, r.bits, r.blocks) for r in real.rows
    ]
    assert {row.path: row.rule for row in planned.rows} == {
        path: "table" if path == "table" else next(r.pattern for r in rules if path in r.pattern or r.pattern == ".*")
        for path in shapes
    }


def test_dry_run_of_groups_that_only_products_have():
    """[64, 4, 16] has no 32 along its last axis but one, but products of it have."""
    tree = {"w": jnp.zeros((64, 4, 16)), "v": jnp.zeros((64, 3))}
    rules = [lcq.Rule(".", lcq.Uniform(4, per=32))]
    with pytest.warns(
        UserWarning, match=r"^w: compress cannot take this rule: per=32 cuts axis 1 .* counted as for quan"
    ):
        planned = {row.path: row for row in dry_run(tree, rules).rows}
    assert (
        planned["w"].bits == planned["w"].dense // 8 + 2 * 64 * 16 and planned["w"].blocks == "32 inputs of a product"
    )
    assert planned["v"].blocks == "32 of axis 0, axis 1" and planned["w"].scheme == "Uniform(4, per=32)"
    with pytest.warns(UserWarning):
        assert dry_run({"w": tree["w"]}, rules).total.bits == planned["w"].bits
    products = dry_run(
        tree, rules, lambda p, x: jnp.einsum("bi,ihd->bhd", x, p["w"]).sum() + x @ p["v"], jnp.zeros((2, 64))
    )
    assert {row.path: row.bits for row in products.rows} == {path: row.bits for path, row in planned.items()}
    with pytest.raises(ValueError, match=r"w: per=32 cuts axis 0 .* the inputs of its product"):
        dry_run({"w": tree["w"]}, rules, lambda p, x: jnp.einsum("bd,ihd->bih", x, p["w"]), jnp.zeros((2, 16)))
    with pytest.raises(ValueError, match=r"per=\(3, 1\) cuts axis 0 of shape \(64, 3\)"):
        dry_run({"v": tree["v"]}, [lcq.Rule("v", lcq.Uniform(4, per=3), layout="io")])
    with pytest.raises(ValueError, match="expected fn and batch with rtn="):
        dry_run(tree, [], rtn=rules)
    with pytest.raises(ValueError, match="expected a batch of fn"):
        dry_run(tree, rules, lambda p, x: x @ p["w"])


def test_dry_run_with_a_function_leaves_forms():
    tree = {"w": jnp.ones((8, 4)), "v": lcq.Uniform(2).project(jnp.ones((4, 2)))}
    planned = dry_run(tree, [lcq.Rule("w", lcq.Uniform(4))], lambda p, x: x @ p["w"] @ p["v"], jnp.ones((3, 8)))
    assert [row.form for row in planned.rows] == ["codes K=4, fixed, scaled", "codes K=16, fixed, scaled"]


def test_a_plan_is_saved_and_its_text_is_read(tmp_path):
    plan = Plan([lcq.Rule("head/.*", None), lcq.Rule("(.*/)?kernel", lcq.KMeans(4, per="channel"), stacked=1)])
    plan.save(tmp_path / "plan.toml")
    assert read_plan(tmp_path / "plan.toml") == read_plan(str(tmp_path / "plan.toml")) == plan
    assert (tmp_path / "plan.toml").read_text() == f"{plan}\n"
    for text in (str(plan), f"# mine\n{plan}", "\n" + str(plan), "rule = []"):
        assert read_plan(text) == (plan if "head" in text else Plan([]))
    with pytest.raises(ValueError, match=r"^rule 1: expected scheme: str, got none"):
        read_plan("[[rule]]\npattern = 'a'")
    for gone in ("plan.tml", "a=b.toml", tmp_path / "rule = []"):
        with pytest.raises(OSError, match="No such file"):
            read_plan(gone)
    with pytest.raises(ValueError, match=r"expected another name, such as plan.toml"):
        plan.save(tmp_path / "net.lcq")
