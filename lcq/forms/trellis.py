"""Trellis: a few new bits a weight, whose value is looked up by many of the last ones."""

import dataclasses
import math
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt16

from lcq.forms import bitpack
from lcq.forms.axes import shares
from lcq.forms.base import Form, leafwise, register_form, static
from lcq.forms.blocks import blocks, cut_axes, join_axes
from lcq.forms.dtypes import nearest_number, wider
from lcq.forms.meshes import by_compiler, explicit_mesh, placed_on
from lcq.forms.paths import as_paths, from_paths, moved_paths, states_of
from lcq.forms.processes import on_host
from lcq.forms.relayout import MatrixView, Relayout, take_from_tables, unstack_tables
from lcq.forms.state_values import CODES, state_values
from lcq.forms.trellis_columns import trellis_columns
from lcq.forms.validate import check_axes, check_blocks, check_float, check_shape, check_words


@register_form
class Trellis(Form):
    """Codes of k bits, of which the last L bits say what a weight is:

        s_i = (s_{i-1} 2^k + c_i) mod 2^L        Delta_i = scale value(s_i)

    along paths through the leaf; before the first code of a piece come its last. So each weight takes k bits, and can
    be read alone, by ceil(L/k) codes.

    Attributes:
        steps: the codes c, uint8 of the leaf's shape; packed uint32 words in the stored layout.
        scale: [*blocks], one for each block of the leaf, of either sign.
        table: of a learned code the value of each state, [2^L], or [*stacked, 2^L]; None otherwise.
        width: k, 1 to 8.
        memory: L, k to 16.
        code: how a state becomes a value, see `lcq.forms.state_values`.
        along: the axes along which paths run, counted from the end.
        length: weights of a piece.
        packed: the leaf's shape if `steps` are words, None in the working layout.
    """

    steps: Any = leafwise()
    scale: Any = None
    table: Any = None
    width: int = static(default=1)
    memory: int = static(default=1)
    code: str = static(default="computed")
    along: tuple[int, ...] = static(default=())
    length: int = static(default=1)
    packed: tuple[int, ...] | None = static(default=None)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.steps.shape if self.packed is None else self.packed

    @property
    def bits(self) -> int:
        return math.prod(self.shape) * self.width + self.shared_bits

    @property
    def shared_bits(self) -> int:
        return sum(8 * a.size * a.dtype.itemsize for a in (self.scale, self.table) if a is not None)

    @property
    def ranges(self) -> dict[str, int]:
        return {"steps": 1 << self.width}

    def pack(self) -> Self:
        if self.packed is not None:
            return self
        host = jax.device_get(on_host(self))
        return dataclasses.replace(host, steps=bitpack.pack(host.steps, self.width), packed=tuple(self.steps.shape))

    def unpack(self) -> Self:
        if self.packed is None:
            return self
        steps = bitpack.unpack(jnp.asarray(self.steps), self.width, self.packed)
        return dataclasses.replace(self, steps=steps, packed=None)

    def states(self) -> UInt16[Array, "t p"]:
        """The state at every weight, the pieces of paths side by side."""
        return states_of(as_paths(self.unpack().steps, self.along, self.length), self.width, self.memory)

    def levels(self) -> Float[Array, "..."]:
        """The value of every weight's state, in the leaf's shape, without the scale."""
        table = None if self.table is None else jnp.asarray(self.table)
        if table is None or table.ndim == 1:
            return from_paths(state_values(self.states(), self.memory, self.code, table), self.shape, self.along)
        states = from_paths(self.states(), self.shape, self.along).astype(jnp.int32)
        layers = states.reshape(*table.shape[:-1], -1)
        return jnp.take_along_axis(table, layers, -1).reshape(self.shape)

    def dense(self) -> Array:
        mesh = explicit_mesh(self)
        return by_compiler(Trellis._dense, None if mesh is None else placed_on(mesh, self.spec(mesh)), self)

    def _dense(self) -> Array:
        scale = jnp.asarray(self.scale)
        cut = blocks(self.shape, scale.shape)
        levels = cut_axes(self.levels(), scale.shape)
        wide = wider(levels.dtype, scale.dtype)
        value = levels.astype(wide) * scale.astype(wide).reshape(cut.stat)
        return nearest_number(join_axes(value, self.shape), self.dtype)

    def describe(self) -> str:
        words = [f"trellis {self.width} bits, {self.code} L={self.memory}"]
        words += [f"{self.scale.size} scales"] if self.scale.size > 1 else []
        return ", ".join(words)

    def one_per(self) -> str:
        return shares(self.shape, self.scale.shape)

    def relayout(self, change: Relayout) -> Form | None:
        if change.idle:
            return self
        along, tables = moved_paths(self.along, change), change.tables({"scale": jnp.asarray(self.scale)})
        if along is None or tables is None or not self._keeps_layers(change):
            return None
        if self.packed is not None and change.in_order:
            return self._replaced(packed=change.result, along=along, **tables)
        form = self.unpack()
        return form._replaced(steps=change.function(form.steps), along=along, **tables)

    def take_rows(self, rows: Int[Array, " R"]) -> Form | None:
        if -len(self.shape) in self.along:
            return None
        form, scale = self.unpack(), jnp.asarray(self.scale)
        table = form.table if form.table is None or form.table.ndim == 1 else jnp.asarray(form.table)[rows]
        return form._replaced(
            steps=form.steps[rows], table=table, **take_from_tables({"scale": scale}, rows, self.shape[0])
        )

    def unstack(self) -> Form | None:
        if -len(self.shape) in self.along:
            return None
        form, table = self.unpack(), self.table
        if table is not None and table.ndim == 1:
            table = jnp.broadcast_to(table, (self.shape[0], *table.shape))
        return form._replaced(table=table, **unstack_tables({"scale": jnp.asarray(self.scale)}, self.shape[0]))

    def prepack(self, view: MatrixView | None = None, *, traced: bool = False) -> Form:
        """As `TrellisColumns`, where paths run down the columns of the matrix."""
        del traced
        matrix: Any = self if view is None else self.relayout(view.of(self.shape))
        if matrix is None or matrix.along != (-2,):
            return self
        form = matrix.unpack()
        how = {"length": form.length, "width": form.width, "memory": form.memory, "code": form.code}
        made = trellis_columns(form.steps, *jax.tree.map(jnp.asarray, (form.scale, form.table)), **how)
        return dataclasses.replace(made, dtype=self.dtype, shared=self.shared).seen_as(self.shape, view)

    def _keeps_layers(self, change: Relayout) -> bool:
        """Whether a change leaves the axes alone along which there are several tables."""
        stacked = 0 if self.table is None else self.table.ndim - 1
        count = math.prod(self.shape[:stacked])
        if not stacked:
            return True
        size, places = math.prod(self.shape[stacked:]), change.places
        kept = change.result[:stacked] == self.shape[:stacked]
        return kept and bool((places.reshape(count, -1) // size == np.arange(count)[:, None]).all())

    def _replaced(self, **changes: Any) -> "Trellis":
        return dataclasses.replace(self, **changes)

    def check_stored(self) -> None:
        if self.packed is None:
            raise ValueError("expected packed codes with the leaf's shape, got the working layout")
        check_shape(self.packed)
        check_float("dtype", self.dtype)
        rank, size = len(self.packed), math.prod(self.packed)
        if not 1 <= self.width <= 8 or not self.width <= self.memory <= 16 or self.code not in CODES:
            raise ValueError(
                f"expected 1 to 8 bits, a memory of {self.width} to 16 and a code of {', '.join(CODES)}, got "
                f"{self.width}, {self.memory} and {self.code[:40]!r}"
            )
        check_axes("along", self.packed, self.along)
        run = math.prod(self.packed[axis] for axis in self.along)
        if self.length < 1 or run % self.length or self.memory > self.length * self.width:
            raise ValueError(f"length: expected one that divides paths of {run} weights and holds {self.memory} bits")
        if self.scale is None:
            raise ValueError("expected a scale, got none")
        check_blocks(self.packed, {"scale": self.scale})
        if (self.table is None) == (self.code == "learned"):
            raise ValueError(f"table: expected one of a learned code alone, got code={self.code!r}")
        if self.table is not None:
            check_float("table", str(self.table.dtype))
            stacked = self.table.ndim - 1
            wanted = (*self.packed[:stacked], 1 << self.memory)
            if self.table.shape != wanted or stacked - rank > min(self.along, default=0):
                raise ValueError(f"table: expected 2^{self.memory} values of a layer, got {list(self.table.shape)}")
        check_words("steps", self.steps, size, 1 << self.width)
