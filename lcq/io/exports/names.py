"""`Name`: what a leaf is called in the file of another program, and which of its axes are outputs."""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence

from lcq.forms.axes import check_layout, letters
from lcq.forms.validate import named


@dataclasses.dataclass(frozen=True)
class Name:
    r"""What the leaves whose path matches are called in another program's file. The first that matches a leaf decides.

    Attributes:
        pattern: a regular expression that must match the whole path.
        name: of the tensor, with \1 for a group of the pattern, and {0}, {1} for the place along stacked axes; None
            leaves the leaf out. "/" becomes ".".
        layout: the axes behind the stacked ones, a letter for each, as in `lcq.Rule`: "io" for kernels of JAX, "oi" for
            weights of PyTorch. Such leaves go out as matrices [outputs, inputs], filters that are no codes with their
            window behind these; None for arrays that go out as they are. "oo" makes one vector of the bias of heads,
            [heads, units].
        stacked: leading axes that count layers; each layer is a tensor of its own.
        experts: axes behind those that count experts and stay axes of the tensor, [experts, outputs, inputs], as GGUF
            has them; `layout` is of one expert. Codes of other formats are matrices: count experts in `stacked`.
        heads: of a query or key projection whose rotary pairs are halves, how many heads it has: its outputs are put
            into the order of interleaved pairs, as GGUF's llama has them, and so is its bias. 0 leaves them as they
            are.
        type: as what it goes out, in the words of the format, such as "int8" or "TQ1_0"; None for the smallest that
            holds it.
        optional: whether there may be no such leaf, as in a list for many nets.

    Example:
        >>> rule = Name(r"layers/(\w+)/kernel", r"model.layers.{0}.\1.weight", layout="io", stacked=1)
        >>> rule.name_of("layers/up/kernel", (3,))
        'model.layers.3.up.weight'
    """

    pattern: str
    name: str | None
    layout: str | None = None
    stacked: int = 0
    heads: int = 0
    type: str | None = None
    optional: bool = False
    experts: int = 0

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"expected a regular expression, got {self.pattern!r} ({error})") from error
        if self.layout is not None and set(self.layout) != {"o"}:
            with named(f"name {self.pattern!r}"):
                check_layout(self.layout)
        if min(self.stacked, self.heads, self.experts) < 0:
            raise ValueError(
                f"name {self.pattern!r}: expected stacked=, heads= and experts= of at least 0, got {self.stacked}, "
                f"{self.heads}, {self.experts}"
            )
        if self.experts and (self.heads or self.layout is None):
            raise ValueError(
                f"name {self.pattern!r}: expected experts= beside the layout of one expert and without heads=, got "
                f"layout={self.layout!r}, heads={self.heads}; say such as layout='io', or drop experts="
            )
        missing = [i for i in range(self.stacked) if self.name is not None and f"{{{i}}}" not in self.name]
        if missing:
            raise ValueError(
                f"name {self.pattern!r}: expected {{{missing[0]}}} in the name for the place along stacked axis "
                f"{missing[0]}, got {self.name!r}; write such as 'layers.{{0}}.weight'"
            )

    def name_of(self, path: str, index: tuple[int, ...]) -> str:
        """The name of a leaf that matches, at a place along its stacked axes."""
        found = re.fullmatch(self.pattern, path)
        assert found is not None and self.name is not None
        name = found.expand(self.name).replace("/", ".")
        return re.sub(r"\{(\d+)\}", lambda place: str(index[int(place[1])]), name) if index else name

    def layout_of(self, rank: int) -> str | None:
        """The letters of all axes behind the stacked ones, experts being outputs; None without a layout.

        Example:
            >>> Name("up", "blk.0.ffn_up_exps.weight", layout="io", experts=1).layout_of(3)
            'oio'
        """
        if not self.experts or self.layout is None:
            return self.layout
        return "o" * self.experts + letters(self.layout, rank - self.experts)

    def places(self, path: str, shape: Sequence[int]) -> Iterator[tuple[tuple[int, ...], str]]:
        """Every place along the stacked axes of a leaf of a shape, with the name of what is there.

        Raises:
            ValueError: a leaf that has fewer axes.
        """
        if len(shape) < self.stacked + self.experts:
            raise ValueError(
                f"{path}: expected at least {self.stacked + self.experts} axes by the name {self.pattern!r}, got "
                f"{list(shape)}; lower stacked={' or experts=' if self.experts else ''}"
            )
        for index in itertools.product(*map(range, shape[: self.stacked])):
            yield index, self.name_of(path, index)


TORCH = (
    Name(r"(.*[/.])?kernel", r"\1weight", layout="io"),
    Name(r"(.*/)?(scale|embedding)", r"\1weight"),
    Name(r"(.*[/.])?weight", r"\g<0>", layout="oi"),
    Name(".*", r"\g<0>"),
)
"""What leaves are called where nothing else is said: flax's names become PyTorch's, and these stay."""


def resolve_names(paths: Sequence[str], names: Sequence[Name], default: Sequence[Name]) -> dict[str, Name]:
    """The name that decides each leaf; one of `default` where none of `names` matches.

    Raises:
        ValueError: anything but names, or a name that decides no leaf.
    """
    if isinstance(names, Name | str | Mapping) or not all(isinstance(name, Name) for name in names):
        raise ValueError(f"expected names= a list such as [lcq.io.Name('w', 'w.weight', layout='io')], got {names!r}")
    every = (*names, *default)
    chosen = {path: next(name for name in every if re.fullmatch(name.pattern, path)) for path in paths}
    for name in names:
        if not name.optional and not any(name is one for one in chosen.values()):
            raise ValueError(
                f"name {name.pattern!r} decides no leaf (a pattern must match the whole path); drop it, or move it up; "
                f"paths are {', '.join(paths[:4])}"
            )
    return chosen


def llama_names(heads: int, kv_heads: int | None = None, *, halves: bool = True) -> tuple[Name, ...]:
    r"""GGUF's names of a llama's leaves that have those of Hugging Face, `model.layers.0.self_attn.q_proj.weight`.

    Frequencies of the rotary embedding, which older checkpoints hold, are left out: llama.cpp computes them.

    Args:
        heads: of queries.
        kv_heads: of keys and values; as many as of queries by default.
        halves: whether rotary pairs are halves of a head, as in checkpoints from the Hub; of weights that have
            interleaved pairs, as those of a GGUF file, queries and keys stay in order.

    Example:
        >>> names = llama_names(9, 3)
        >>> names[0].name_of("model.layers.2.self_attn.q_proj.weight", ())
        'blk.2.attn_q.weight'
    """
    turned = {"q": heads, "k": kv_heads or heads} if halves else {}
    layer = r"model\.layers\.(\d+)\."
    matrices = {f"self_attn.{a}_proj": f"attn_{a}" for a in "qkv"} | {"self_attn.o_proj": "attn_output"}
    matrices |= {f"mlp.{a}_proj": f"ffn_{a}" for a in ("gate", "up", "down")}
    norms = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    rows = [
        *(
            Name(rf"{layer}{re.escape(old)}\.weight", rf"blk.\1.{new}.weight", "oi", heads=turned.get(new[-1], 0))
            for old, new in matrices.items()
        ),
        *(
            Name(rf"{layer}{re.escape(old)}\.bias", rf"blk.\1.{new}.bias", heads=turned.get(new[-1], 0))
            for old, new in matrices.items()
        ),
        *(Name(rf"{layer}{old}\.weight", rf"blk.\1.{new}.weight") for old, new in norms.items()),
        Name(r".*rotary_emb\.inv_freq", None),
        Name(r"model\.embed_tokens\.weight", "token_embd.weight", "oi"),
        Name(r"model\.norm\.weight", "output_norm.weight"),
        Name(r"lm_head\.weight", "output.weight", "oi"),
    ]
    return tuple(dataclasses.replace(name, optional=True) for name in rows)
