"""`lcq quantize`: a function and data by name, a mask, a plan, and every complaint in one line."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import lcq
from lcq.cli.calibration import products_of
from lcq.io.checkpoints import checkpoint
from lcq.ptq.quantize import Quantized, Record
from lcq.reporting.summary import text
from tests.cli.command import RULE, run, same

NET = """
import jax

number = 3


def apply(params, tokens):
    x = params["embedding"][tokens]
    for name in ("dense0", "dense1"):
        x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"])
    return x


def misspelt(params, tokens):
    return params["embeding"][tokens]


def masked(params, batch):
    return apply(params, batch["tokens"])


def transposed(params, tokens):
    return params["embedding"][tokens] @ params["dense0"]["kernel"].T @ params["dense1"]["kernel"].T
"""


@pytest.fixture
def net(tmp_path, monkeypatch):
    """A current folder with a module tinynet, its checkpoint net.npz, and data.npz: 21 rows of 3 tokens."""
    rng = np.random.default_rng(0)
    shapes = {"kernel": (6, 6), "bias": (6,)}
    params = {
        name: {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}
        for name in ("dense0", "dense1")
    } | {"embedding": rng.normal(size=(11, 6)).astype(np.float32)}
    checkpoint.write(tmp_path / "net.npz", params)
    tokens = rng.integers(0, 11, (21, 3))
    np.savez(tmp_path / "data.npz", tokens=tokens)
    (tmp_path / "tinynet.py").write_text(NET)
    (tmp_path / "broken.py").write_text("import nowhere_at_all\n")
    (tmp_path / "torn.py").write_text("def apply(:\n")
    monkeypatch.chdir(tmp_path)
    for module in ("tinynet", "broken", "torn"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    return params, tokens


def quantize(*more, function="tinynet:apply", source="net.npz", data="data.npz", rule="dense./kernel=Ternary"):
    return run("quantize", function, source, "--data", data, "--rule", rule, "-o", "out.lcq", *more)


def test_quantize_does_what_the_function_does(net, capsys):
    params, tokens = net
    path = list(sys.path)
    assert quantize("--rtn-rule", "embedding=Uniform(4)", "--batch", "8") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert sys.path == path

    def apply(params, tokens):
        x = params["embedding"][tokens]
        for name in ("dense0", "dense1"):
            x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"])
        return x

    rules = [lcq.Rule("dense./kernel", lcq.Ternary())], [lcq.Rule("embedding", lcq.Uniform(4))]
    expected = lcq.quantize(apply, params, [tokens[:8], tokens[8:16], tokens[16:]], rules[0], rtn=rules[1])
    same(lcq.load("out.lcq"), expected.forms)
    assert not np.array_equal(lcq.load("out.lcq")["dense1"]["bias"], params["dense1"]["bias"])
    lines = [line.split() for line in captured.out.splitlines()]
    for record in expected.records:
        facts = [record.path, "1x24x6x6", "Descent,", f"{record.recursion},", *"bias corrected 3 2".split()]
        numbers = [f"{record.error:.2e}", f"{record.held_out:.2e}", f"{record.scale:.3g}"]
        assert [*facts, *numbers] in [line[:-1] for line in lines]
    size = (Path("out.lcq")).stat().st_size
    assert ["on", "disk", f"{8 * size:,}", f"{size:,}"] in [line[:4] for line in lines] and "distortion" in captured.out
    assert lcq.read_plan("out.lcq") == lcq.Plan([*rules[1], *rules[0]])
    assert quantize() == 1 and "--force" in capsys.readouterr().err


def test_products_say_what_rows_that_did_not_choose_say(monkeypatch):
    """The error of the rows that chose codes is the smaller one, the less data the more; experts may have had none."""
    monkeypatch.setenv("COLUMNS", "200")
    one = Record("w", (4, 24, 6, 6), 16, "Descent()", "blocked", False, 1.0, 0.5, 0, 1e-3, 2.0, silent=(1, 3))
    shown = text(products_of(Quantized({}, (one._replace(held_out=0.02), one._replace(path="v", silent=())))))
    how = "blocked, no data in 2 of 4 groups 16 4 1.00e-03"
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert f"w 4x24x6x6 Descent, {how} 2.00e-02 0.5 2.00" in lines
    assert "v 4x24x6x6 Descent, blocked 16 4 1.00e-03 0.5 2.00" in lines and "held out" in lines[0] + lines[1]


def test_quantize_takes_a_plan(net):
    Path("plan.toml").write_text(str(lcq.Plan([lcq.Rule("dense./kernel", lcq.Ternary())])))
    command = ["quantize", "tinynet:apply", "net.npz", "--data", "data.npz", "-o", "out.lcq"]
    assert run(*command, "--plan", "plan.toml") == 0
    assert lcq.read_plan("out.lcq") == lcq.read_plan("plan.toml")
    assert lcq.load("out.lcq")["dense0"]["kernel"].size_of_table == 3
    assert run(*command, "--plan", "plan.toml", "--rule", RULE) == 2 and run(*command) == 2


@pytest.mark.parametrize(
    ("more", "lengths"),
    [
        ((), [21]),
        (("--batch", "7"), [7, 7, 7]),
        (("--batch", "10"), [10, 10, 1]),
        (("--batch", "10", "--limit", "20"), [10, 10]),
        (("--batch", "10", "--limit", "13"), [10, 3]),
        (("--limit", "4"), [4]),
        (("--limit", "40"), [21]),
    ],
)
def test_quantize_makes_batches_of_all_examples(net, more, lengths, monkeypatch):
    _, tokens = net
    given, options = asked(monkeypatch, *more)
    assert [batch.shape for batch in given["batches"]] == [(length, 3) for length in lengths]
    used = np.concatenate(given["batches"])
    np.testing.assert_array_equal(used, tokens[: sum(lengths)])
    assert (
        options["bias_correction"]
        and given["method"] == lcq.Descent()
        and options["rtn"] == []
        and options["mask"] is None
    )


def test_quantize_hands_on_several_arrays_and_the_options(net, monkeypatch):
    _, tokens = net
    np.savez("many.npz", **{"tokens": tokens, "mask": tokens > 3})
    more = ("--batch", "9", "--method", "spfq", "--seed", "5", "--no-bias-correction", "--rtn-rule", "embedding=Cast")
    given, options = asked(monkeypatch, *more, data="many.npz")
    assert [{name: a.shape for name, a in batch.items()} for batch in given["batches"]] == [
        {"tokens": (length, 3), "mask": (length, 3)} for length in (9, 9, 3)
    ]
    np.testing.assert_array_equal(given["batches"][1]["mask"], tokens[9:18] > 3)
    assert given["method"] == lcq.ptq.SPFQ(seed=5) and not options["bias_correction"]
    assert options["rtn"] == [lcq.Rule("embedding", lcq.Cast())]


def test_quantize_leaves_out_what_the_mask_does(net, capsys):
    """Which token pads is no matter, in the short last batch as in others."""
    _, tokens = net
    counts = np.ones(tokens.shape, np.int32)
    counts[4:, 2] = counts[17, 1] = 0
    for padding in (3, 7):
        np.savez(f"{padding}.npz", tokens=np.where(counts, tokens, padding), attention=counts)

    def layers(padding, *more):
        done = quantize("--batch", "8", "--force", *more, function="tinynet:masked", data=f"{padding}.npz")
        assert done == 0 and Path("out.lcq").exists()
        return jax.tree.leaves(lcq.decompress(lcq.load("out.lcq")))

    for one, other in zip(layers(3, "--mask", "attention"), layers(7, "--mask", "attention"), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    counts[16:] = 0  # a batch of padding alone
    np.savez("8.npz", tokens=np.where(counts, tokens, 3), attention=counts)
    np.savez("9.npz", tokens=tokens[:16], attention=counts[:16])
    for one, other in zip(layers(8, "--mask", "attention"), layers(9, "--mask", "attention"), strict=True):
        np.testing.assert_array_equal(one, other)
    differ = [np.abs(one - other).max() > 1e-2 for one, other in zip(layers(3), layers(7), strict=True)]
    assert any(differ)
    np.savez("none.npz", tokens=tokens, attention=0 * counts)
    assert quantize("--mask", "attention", "--force", data="none.npz") == 1
    assert "none.npz: attention: expected a position that counts" in capsys.readouterr().err
    assert quantize("--mask", "attention", "--force") == 1
    assert "inputs and the array 'attention' that says which of their positions" in capsys.readouterr().err
    assert quantize("--mask", "tokens", "--force") == 1 and "; name it with --mask" in capsys.readouterr().err


def test_quantize_takes_the_name_of_a_file_for_that_of_its_module(net, capsys):
    assert quantize("--dry-run", function="tinynet.py:apply") == 0 and capsys.readouterr().err == ""


def test_quantize_dry_run_writes_nothing(net, capsys, monkeypatch):
    monkeypatch.setattr(lcq, "quantize", None)
    monkeypatch.setenv("COLUMNS", "200")
    command = [
        "quantize",
        "tinynet:apply",
        "net.npz",
        "--data",
        "data.npz",
        "--rule",
        "dense./kernel=Uniform(4, per=3)",
    ]
    assert run(*command, "--dry-run", "--rtn-rule", "embedding=Cast") == 0
    shown = capsys.readouterr().out
    assert "3 of axis 0, axis 1" in shown and "bfloat16" in shown and not Path("out.lcq").exists()
    assert run(*command) == 2 and "expected -o OUT.lcq, or --dry-run" in capsys.readouterr().err
    transposed = [*command, "--dry-run"]
    transposed[1] = "tinynet:transposed"
    assert run(*transposed) == 0 and "axis 0, 3 of axis 1" in capsys.readouterr().out
    assert run(*command[:-1], "dense./kernel=Uniform(4, per=4)", "--dry-run") == 1
    assert capsys.readouterr().err.startswith("lcq quantize: dense0/kernel: ")


def asked(monkeypatch, *more, **where):
    """What the command asks of lcq.quantize."""
    asked = []

    def stand_in(fn, params, batches, rules, method, **options):
        asked.append(({"batches": batches, "method": method}, options))
        raise ValueError("enough")

    monkeypatch.setattr(lcq, "quantize", stand_in)
    assert quantize(*more, **where) == 1
    return asked[0]


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"function": "notthere:apply"}, "notthere: no such module, neither in "),
        ({"function": "tinynet.inner:apply"}, "tinynet.inner: no such module"),
        ({"function": "tinynet:aply"}, "tinynet: no 'aply' in it; it has apply, misspelt, masked"),
        ({"function": "tinynet:number"}, "tinynet:number: expected a function of (params, batch), got int"),
        ({"function": "tinynet:misspelt"}, "tinynet:misspelt: KeyError: 'embeding' (tinynet.py, line 15)"),
        ({"function": "broken:apply"}, "broken: No module named 'nowhere_at_all', which it imports"),
        ({"function": "torn:apply"}, "torn: SyntaxError: "),
        ({"source": "gone.npz"}, "gone.npz: no such file"),
        ({"data": "gone.npz"}, "gone.npz: no such file"),
        (
            {"data": "uneven.npz"},
            "uneven.npz: expected arrays with equally many examples along their first axis, got a [2]",
        ),
        ({"data": "empty.npz"}, "empty.npz: expected arrays"),
        ({"data": "number.npz"}, "number.npz: expected arrays"),
        ({"rule": "kernel=Ternary"}, "rule 'kernel' matches no leaf"),
        ({"rule": "embedding=Ternary"}, "embedding: expected a leaf that only products use"),
        (
            {"rule": ".*/kernel=KMeans(2); joint"},
            "dense0/kernel, dense1/kernel: each product has a codebook of its own",
        ),
    ],
)
def test_quantize_says_what_is_wrong_in_one_line(net, changed, complaint, capsys):
    np.savez("uneven.npz", a=np.ones(2), b=np.ones(3))
    np.savez("empty.npz", a=np.ones((0, 3)))
    np.savez("number.npz", a=np.float32(3))
    assert quantize(**changed) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("lcq quantize: ") and captured.err.count("\n") == 1 and captured.out == ""
    assert complaint in captured.err and not Path("out.lcq").exists()


def test_quantize_misses_a_folder_before_it_works(net, capsys, monkeypatch):
    monkeypatch.setattr(lcq, "quantize", None)
    assert quantize("-o", "no/out.lcq") == 1 and "no: no such folder" in capsys.readouterr().err
