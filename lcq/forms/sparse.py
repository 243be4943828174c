"""Sparse: few values among zeros."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from lcq.forms import bitpack
from lcq.forms.axes import shares
from lcq.forms.base import Form, leafwise, register_form, static
from lcq.forms.codes import Codes
from lcq.forms.dtypes import nearest_number
from lcq.forms.ell import lists
from lcq.forms.processes import on_host
from lcq.forms.relayout import MatrixView, Relayout, take_from_tables, unstack_tables
from lcq.forms.validate import check_blocks, check_codes, check_float, check_shape

_SMALL = 1 << 16
"""Up to so many weights a stored form on the host is unpacked there: array operations and their compilations, one for
each number of kept weights, would take longer."""


@register_form
class Sparse(Form):
    """Few values among zeros: Delta = values where the mask is true, else 0.

    The stored layout holds the values of the chosen weights alone, in row-major order, and where they are: a bit for
    each group of weights, or the gaps between chosen groups, whichever is smaller.

    Attributes:
        mask: bool of the leaf's shape; in the stored layout uint32 words, see `bitpack.pack_positions`.
        values: floats of the leaf's shape, or codes if there are `levels`; stored: those chosen, codes packed.
        levels: the values' codebook, [*blocks, K] as in `Codes`; None if they are floats.
        group: lengths along the trailing axes of what is chosen together; () for single weights.
        share: the part of the weights that is chosen, as far as the scheme knows; for sizes of what is not computed.
        packed: the leaf's shape if the layout is stored, None if it is working.
        kept: how many weights are chosen, in the stored layout.
        gap: bits of a gap code in the stored layout; None for a bit mask.
    """

    mask: Any = leafwise(mask=True)
    values: Any = leafwise()
    levels: Any = None
    group: tuple[int, ...] = static(default=())
    share: float = static(default=1.0)
    packed: tuple[int, ...] | None = static(default=None)
    kept: int = static(default=0)
    gap: int | None = static(default=None)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.mask.shape if self.packed is None else self.packed

    @property
    def bits(self) -> int:
        """In the working layout of what is traced or a shape struct an estimate, from `share` and a bit mask."""
        if self.packed is None:
            if all(isinstance(a, np.ndarray | jax.Array) and not isinstance(a, jax.core.Tracer) for a in self._arrays):
                return self.pack().bits
            size = math.prod(self.shape)
            return size // math.prod(self.group) + round(self.share * size) * self._width + self.shared_bits
        if self.levels is None:
            return 32 * self.mask.size + 8 * self.values.size * self.values.dtype.itemsize
        return 32 * (self.mask.size + self.values.size) + self.shared_bits

    @property
    def shared_bits(self) -> int:
        return 0 if self.levels is None else 8 * self.levels.size * self.levels.dtype.itemsize

    @property
    def _arrays(self) -> tuple[Any, ...]:
        return (self.mask, self.values) if self.levels is None else (self.mask, self.values, self.levels)

    @property
    def _width(self) -> int:
        """Bits of one value."""
        return 8 * self.values.dtype.itemsize if self.levels is None else bitpack.width(self.levels.shape[-1])

    @property
    def alphabets(self) -> dict[str, tuple[int, int]]:
        if self.gap is None:
            places = {"mask": (2, math.prod(self.shape) // math.prod(self.group))}
        else:
            places = {"mask": (1 << self.gap, 32 * self.mask.size // self.gap)}
        return places if self.levels is None else places | {"values": (self.levels.shape[-1], self.kept)}

    @property
    def ranges(self) -> dict[str, int]:
        return {"mask": 2} | ({} if self.levels is None else {"values": self.levels.shape[-1]})

    def _lengths(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Lengths of a group along all axes."""
        return (1,) * (len(shape) - len(self.group)) + self.group

    def pack(self) -> Self:
        if self.packed is not None:
            return self
        host = jax.device_get(on_host(self))
        shape = tuple(self.mask.shape)
        firsts = np.asarray(host.mask[tuple(slice(None, None, n) for n in self._lengths(shape))])
        words, gap = bitpack.pack_positions(firsts)
        values = host.values[host.mask]
        kept = values.size
        if self.levels is not None:
            values = bitpack.pack(values, self._width)
        return dataclasses.replace(host, mask=words, values=values, packed=shape, kept=kept, gap=gap)

    def unpack(self) -> Self:
        if self.packed is None:
            return self
        if math.prod(self.packed) >= 1 << 31:
            raise ValueError(
                f"expected a sparse leaf of fewer than 2^31 weights, got {list(self.packed)}: places in it are "
                "numbered in 32 bits; compress the layers stacked in it as leaves of their own"
            )
        lengths = self._lengths(self.packed)
        counts = tuple(n // g for n, g in zip(self.packed, lengths, strict=True))
        groups = self.kept // math.prod(lengths)
        if math.prod(self.packed) <= _SMALL and all(isinstance(a, np.ndarray) for a in self._arrays):
            return self._unpack_host(lengths, counts, groups)
        mask = bitpack.unpack_positions(jnp.asarray(self.mask), self.gap, groups, math.prod(counts)).reshape(counts)
        for axis, length in enumerate(lengths):
            mask = jnp.repeat(mask, length, axis) if length > 1 else mask
        values = jnp.asarray(self.values)
        if self.levels is not None:
            values = bitpack.unpack(values, self._width, (self.kept,))
        spread = jnp.zeros(self.packed, values.dtype)
        if self.kept:
            order = jnp.cumsum(mask.reshape(-1), dtype=jnp.uint32).reshape(self.packed) - 1
            spread = jnp.where(mask, values[jnp.where(mask, order, 0)], spread)
        return dataclasses.replace(self, mask=mask, values=spread, packed=None, kept=0, gap=None)

    def _unpack_host(self, lengths: tuple[int, ...], counts: tuple[int, ...], groups: int) -> Self:
        """As `unpack`, in numpy."""
        mask = bitpack.unpack_positions_host(self.mask, self.gap, groups, math.prod(counts)).reshape(counts)
        for axis, length in enumerate(lengths):
            mask = np.repeat(mask, length, axis)
        values = self.values if self.levels is None else bitpack.unpack_host(self.values, self._width, self.kept)
        spread = np.zeros(self.shape, values.dtype)
        spread[mask] = values
        return dataclasses.replace(
            self, mask=jnp.asarray(mask), values=jnp.asarray(spread), packed=None, kept=0, gap=None
        )

    def dense(self) -> Array:
        form = self.unpack()
        values = form.values
        if form.levels is not None:
            values = Codes(values, levels=form.levels, dtype=str(form.levels.dtype)).dense()
        values = nearest_number(values, self.dtype)
        return jnp.where(form.mask, values, np.zeros((), values.dtype))

    def describe(self) -> str:
        words = [f"sparse {self.values.dtype if self.levels is None else f'K={self.levels.shape[-1]}'}"]
        if self.packed is not None:
            words += [f"{self.kept:,} kept", "bit mask" if self.gap is None else f"gaps of {self.gap} bits"]
        return ", ".join(words)

    def one_per(self) -> str:
        if not self.group:
            return ""
        return shares(self.shape, [n // g for n, g in zip(self.shape, self._lengths(self.shape), strict=True)])

    def relayout(self, change: Relayout) -> Form | None:
        if change.idle:
            return self
        tables = change.tables(self._tables())
        if tables is None:
            return None
        if self.packed is not None and change.in_order and not self.group:
            return self._replaced(packed=change.result, **tables)
        return self._changed(change.function, tables)

    def take_rows(self, rows: Int[Array, " R"]) -> Form:
        return self._changed(lambda a: a[rows], take_from_tables(self._tables(), rows, self.shape[0]))

    def unstack(self) -> Form:
        return self._changed(lambda a: a, unstack_tables(self._tables(), self.shape[0]))

    def prepack(self, view: MatrixView | None = None, *, traced: bool = False) -> Form:
        """As `Ell`, where few weights are few in each column; on the host, as the length of lists depends on the mask.

        Example:
            >>> import lcq
            >>> w = jnp.array([[0.1, 5.0], [0.2, 0.3], [4.0, 0.1], [0.0, 0.3]])
            >>> ready = lcq.Prune(count=2).project(w).prepack()
            >>> ready.places.tolist(), ready.values.tolist()
            ([[2, 0]], [[4.0, 5.0]])
        """
        if traced or any(isinstance(a, jax.core.Tracer) for a in jax.tree.leaves(self)):
            return self
        here = jax.tree.map(lambda a: jnp.asarray(np.asarray(a)), self)  # a copy that is on no mesh
        matrix: Any = here if view is None else here.relayout(view.of(self.shape))
        if matrix is None:
            return self
        form = matrix.unpack()
        made = lists(np.asarray(form.mask), np.asarray(form.dense()))
        if made is None:
            return self
        return dataclasses.replace(made, dtype=self.dtype, shared=self.shared).seen_as(self.shape, view)

    def _tables(self) -> dict[str, Array]:
        return {} if self.levels is None else {"levels": jnp.asarray(self.levels)}

    def _changed(self, change: Callable[[Any], Any], tables: dict[str, Array]) -> "Sparse":
        form = self.unpack()
        return form._replaced(mask=change(form.mask), values=change(form.values), group=(), **tables)

    def _replaced(self, **changes: Any) -> "Sparse":
        return dataclasses.replace(self, **changes)

    def check_stored(self) -> None:
        if self.packed is None:
            raise ValueError("expected packed values with the leaf's shape, got the working layout")
        check_shape(self.packed)
        check_float("dtype", self.dtype)
        if not 0 <= self.share <= 1:
            raise ValueError(f"share: expected a part of the weights, got {self.share}")
        if len(self.group) > len(self.packed) or any(
            g < 1 or n % g for g, n in zip(self.group[::-1], self.packed[::-1], strict=False)
        ):
            raise ValueError(f"group: expected lengths that divide {list(self.packed)}, got {list(self.group)}")
        size, together = math.prod(self.packed), math.prod(self.group)
        if not 0 <= self.kept <= size or self.kept % together:
            raise ValueError(f"kept: expected at most {size} weights in groups of {together}, got {self.kept}")
        if self.levels is None:
            check_float("values", str(self.values.dtype))
            wanted = (self.values.dtype, self.kept)
        else:
            check_blocks(self.packed, {"levels": self.levels})
            if not 1 <= self.levels.shape[-1] <= 65536:
                raise ValueError(f"expected 1 to 65,536 levels, got {self.levels.shape[-1]}")
            wanted = (np.dtype(np.uint32), bitpack.word_count(self.kept, self._width))
        if (self.values.dtype, self.values.shape) != (wanted[0], wanted[1:]):
            got = f"{self.values.dtype}{list(self.values.shape)}"
            raise ValueError(f"values: expected {wanted[0]}[{wanted[1]}] for {self.kept} weights, got {got}")
        if self.gap is not None and not 2 <= self.gap <= 16:
            raise ValueError(f"gap: expected 2 to 16 bits, got {self.gap}")
        if self.mask.dtype != np.uint32 or len(self.mask.shape) != 1:
            raise ValueError(f"mask: expected words, got {self.mask.dtype}{list(self.mask.shape)}")
        if isinstance(self.mask, np.ndarray | jax.Array):
            bitpack.check_positions(np.asarray(self.mask), self.gap, self.kept // together, size // together)
        if self.levels is not None:
            check_codes("values", self.values, self.kept, self.levels.shape[-1])
