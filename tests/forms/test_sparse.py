"""Sparse forms against loops over the mask: the fewest bits, the same array from both layouts and from a file."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lcq
from lcq.forms import Sparse
from lcq.forms.bitpack import width
from lcq.io import records
from lcq.io.tree_paths import flatten


def sparse(mask, k=None, group=(), seed=0):
    """A working form with this mask, its values codes of k levels if k is given."""
    rng = np.random.default_rng(seed)
    if k is None:
        values = np.where(mask, rng.normal(size=mask.shape), 0).astype(np.float32)
        return Sparse(jnp.asarray(mask), jnp.asarray(values), group=group)
    codes = np.where(mask, rng.integers(0, k, mask.shape), 0).astype(np.uint8 if k <= 256 else np.uint16)
    levels = np.sort(rng.normal(size=(1,) * mask.ndim + (k,))).astype(np.float32)
    return Sparse(*map(jnp.asarray, (mask, codes, levels)), group=group)


def random_mask(shape, density, group=(), seed=1):
    lengths = (1,) * (len(shape) - len(group)) + tuple(group)
    chosen = np.random.default_rng(seed).random([n // g for n, g in zip(shape, lengths, strict=True)]) < density
    return np.kron(chosen, np.ones(lengths, bool)).astype(bool).reshape(shape)


def fewest_words(chosen):
    """32-bit words of the shortest way to write a mask: bits, or gaps of 2 to 16 bits; place by place."""
    best = -(-len(chosen) // 32)
    for bits in range(2, 17):
        codes = skipped = 0
        for place in chosen:
            codes, skipped = (codes + 1 + skipped // (2**bits - 1), 0) if place else (codes, skipped + 1)
        best = min(best, -(-codes * bits // 32))
    return best


def stream(words):
    return int.from_bytes(np.asarray(words, "<u4").tobytes(), "little")


def decoded(form):
    """The dense array of a stored form, read bit by bit."""
    lengths = (1,) * (len(form.packed) - len(form.group)) + form.group
    counts = [n // g for n, g in zip(form.packed, lengths, strict=True)]
    chosen, bits = np.zeros(int(np.prod(counts)), bool), stream(form.mask)
    if form.gap is None:
        chosen[:] = [bits >> i & 1 for i in range(chosen.size)]
    else:
        place, escape = -1, 2**form.gap - 1
        for _ in range(form.kept // int(np.prod(lengths))):
            while (code := bits % (escape + 1)) == escape:
                place, bits = place + escape, bits >> form.gap
            place, bits = place + code + 1, bits >> form.gap
            chosen[place] = True
    dense, mask = np.zeros(form.packed, np.float32), np.kron(chosen.reshape(counts), np.ones(lengths)) > 0
    values = form.values
    if form.levels is not None:
        table = form.levels.reshape(-1)
        w = width(table.size)
        values = [table[stream(form.values) >> (i * w) & ((1 << w) - 1)] for i in range(form.kept)]
    dense[mask.reshape(form.packed)] = values
    return dense


CASES = {
    "nothing": ((6, 4), 0.0, None, ()),
    "1 of 20000": ((200, 100), 7e-5, None, ()),
    "5 %": ((60, 50), 0.05, None, ()),
    "half": ((9, 7), 0.5, None, ()),
    "everything": ((5, 7), 1.0, None, ()),
    "codes": ((40, 30), 0.1, 5, ()),
    "one level": ((8, 9), 0.3, 1, ()),
    "long codes": ((40, 30), 0.5, 300, ()),
    "columns": ((6, 20), 0.3, None, (6, 1)),
    "blocks of a cube": ((4, 6, 8), 0.1, 4, (3, 2)),
    "few rows": ((640, 3), 0.01, 4, (1, 3)),
    "no axes": ((), 1.0, None, ()),
    "no axes, nothing": ((), 0.0, 2, ()),
}


@pytest.mark.parametrize("case", CASES)
def test_the_stored_layout_is_the_shortest_and_gives_the_same_array(tmp_path, case):
    shape, density, k, group = CASES[case]
    form = sparse(random_mask(shape, density, group), k, group)
    stored = form.pack()
    value = 32 if k is None else (k - 1).bit_length()
    together, kept = int(np.prod(group)), int(np.count_nonzero(form.mask))
    words = fewest_words(np.ravel(form.mask)) if not group else stored.mask.size
    places = 32 * words + (32 * kept if k is None else 32 * -(-kept * value // 32) + 32 * k)
    assert stored.bits == form.bits == places and stored.kept == kept and kept % together == 0
    expected = decoded(stored)
    for layout in (form, stored, stored.unpack()):
        np.testing.assert_array_equal(layout.dense(), expected)
    stored.check_stored()
    lcq.save(tmp_path / "net.lcq", {"w": form})
    back = lcq.load(tmp_path / "net.lcq")["w"]
    assert (back.group, back.gap, back.kept, back.packed) == (group, stored.gap, kept, shape)
    np.testing.assert_array_equal(back.dense(), expected)


def test_a_group_takes_one_place():
    mask = random_mask((64, 12), 0.02, (2, 3))
    stored = sparse(mask, group=(2, 3)).pack()
    assert stored.mask.size == fewest_words(mask[::2, ::3].reshape(-1)) < fewest_words(mask.reshape(-1))


def test_bits_of_what_is_not_computed_are_estimated():
    """From a bit mask and the part that is kept: what a dry run shows before anything is compressed."""
    scheme = lcq.Prune(fraction=0.25, values=lcq.KMeans(4))
    shapes = jax.eval_shape(scheme.project, jax.ShapeDtypeStruct((16, 8), jnp.float32))
    assert shapes.bits == 128 + 32 * 2 + 4 * 32


# Files that nobody should write

GOOD = sparse(np.isin(np.arange(60), (2, 40)).reshape(6, 10), 3).pack()
PLAIN = sparse((np.arange(24) % 2 == 0).reshape(4, 6)).pack()


def changed(form=PLAIN, **fields):
    return dataclasses.replace(form, **fields)


def words(*numbers):
    return np.array(numbers, np.uint32)


HOSTILE = [
    (changed(packed=None), "working layout"),
    (changed(packed=(-4, -6)), "at most 64 axes"),
    (changed(packed=(1 << 40, 1 << 40)), "at most 64 axes"),
    (changed(dtype="int8"), "dtype: expected one of"),
    (changed(share=1.5), "share: expected a part of the weights, got 1.5"),
    (changed(share=-0.5), "share: expected"),
    (changed(group=(5,)), r"group: expected lengths that divide \[4, 6\], got \[5\]"),
    (changed(group=(0, 1)), "group: expected"),
    (changed(group=(-1, 1)), "group: expected"),
    (changed(group=(1, 1, 1)), "group: expected"),
    (changed(kept=-1), "kept: expected at most 24"),
    (changed(kept=25), "kept: expected at most 24"),
    (changed(kept=PLAIN.kept - 1), "values: expected"),
    (changed(group=(1, 2), kept=3), "kept: expected at most 24 weights in groups of 2, got 3"),
    (changed(kept=PLAIN.kept - 1, values=PLAIN.values[1:]), "expected 11 of 24 places, got 12"),
    (changed(kept=PLAIN.kept + 1, values=np.r_[PLAIN.values, PLAIN.values[:1]]), "expected 13 of 24 places, got 12"),
    (changed(values=PLAIN.values[:, None]), "values: expected"),
    (changed(values=PLAIN.values.astype(np.int32)), "values: expected one of"),
    (changed(values=np.where(np.arange(12) == 5, np.nan, PLAIN.values)), "values: expected finite numbers, got 1"),
    (changed(values=np.where(np.arange(12) == 5, -np.inf, PLAIN.values)), "values: expected finite numbers, got 1"),
    (changed(mask=PLAIN.mask | words(1 << 24), kept=13, values=np.ones(13, np.float32)), "bits behind its end"),
    (changed(mask=np.r_[PLAIN.mask, words(0)]), "expected 12 of 24 places, got 12 up to 24 in 2 words"),
    (changed(mask=PLAIN.mask[:0], kept=0, values=PLAIN.values[:0]), "in 0 words"),
    (changed(mask=PLAIN.mask[:, None]), "mask: expected words"),
    (changed(mask=PLAIN.mask.astype(np.int32)), "mask: expected words"),
    (changed(gap=1), "gap: expected 2 to 16 bits, got 1"),
    (changed(gap=17), "gap: expected"),
    (changed(gap=4, mask=words(0x9E), kept=2, values=PLAIN.values[:2]), "expected 2 of 24 places, got 2 up to 25"),
    (changed(gap=16, mask=words(0xFFFFFFFF), kept=1, values=PLAIN.values[:1]), "got 0"),
    (changed(GOOD, levels=GOOD.levels[0]), "levels: expected block counts"),
    (changed(GOOD, levels=np.where(GOOD.levels < 9, np.nan, 0)), "levels: expected finite"),
    (changed(GOOD, levels=GOOD.levels[..., :0]), "1 to 65,536 levels, got 0"),
    (changed(GOOD, values=GOOD.values | words(3)), "values: expected codes below 3, got a larger one"),
    (changed(GOOD, values=GOOD.values[:0]), r"values: expected uint32\[1\]"),
    (changed(GOOD, values=np.r_[GOOD.values, words(0)]), r"values: expected uint32\[1\]"),
    (changed(GOOD, values=np.ones(GOOD.kept, np.float32)), r"values: expected uint32\[1\]"),
]


@pytest.mark.parametrize(("form", "message"), HOSTILE)
def test_a_hostile_file_is_refused(tmp_path, monkeypatch, form, message):
    with monkeypatch.context() as unchecked:
        unchecked.setattr(records, "check_form", lambda form: None)
        unchecked.setattr(Sparse, "pack", lambda self: self)
        unchecked.setattr(Sparse, "alphabets", {})
        lcq.save(tmp_path / "net.lcq", {"w": form})
    with pytest.raises(lcq.ArtifactError, match=f"w: .*({message})"):
        lcq.load(tmp_path / "net.lcq")
    with pytest.raises(ValueError, match=message):
        records.check_form(form)


# Joint tasks


def test_a_joint_task_stores_its_codebook_once(tmp_path):
    rng = np.random.default_rng(4)
    params = {"a": jnp.asarray(rng.normal(size=(6, 4)), jnp.float32), "b": jnp.asarray(rng.normal(size=9), jnp.float32)}
    forms = lcq.compress(params, [lcq.Rule("a|b", lcq.Prune(count=12, values=lcq.KMeans(3, exact=True)), joint=True)])
    lcq.save(tmp_path / "net.lcq", forms)
    encoder = records.Encoder()
    back = lcq.load(tmp_path / "net.lcq")
    for leaf in flatten(back)[0]:
        encoder.encode(leaf)
    assert sorted(encoder.streams) == ["a.levels", "a.mask", "a.values", "b.mask", "b.values"]
    for name in params:
        np.testing.assert_array_equal(back[name].dense(), forms[name].dense())
    sizes = lcq.sizes(back)
    kept = [form.kept for form in back.values()]
    assert sum(kept) == 12 and all(n > 0 for n in kept)
    assert [row.bits for row in sizes.values()] == [32 + 32 + 3 * 32, 32 + 32]
