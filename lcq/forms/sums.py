"""Sum: several forms added together."""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any, Self

import jax.numpy as jnp
from jaxtyping import Array, Int

from lcq.forms.base import Form, register_form
from lcq.forms.dtypes import nearest_number, wider
from lcq.forms.relayout import MatrixView, Relayout
from lcq.forms.validate import check_float, named


@register_form
class Sum(Form):
    """Forms of one shape added together: Delta = sum_j Delta_j(Theta_j), summed in the order of the parts.

    Attributes:
        parts: the forms, at least one.
    """

    parts: tuple[Form, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parts[0].shape

    @property
    def bits(self) -> int:
        return sum(part.bits for part in self.parts)

    @property
    def shared_bits(self) -> int:
        return sum(part.shared_bits for part in self.parts)

    def pack(self) -> Self:
        return self._each(operator.methodcaller("pack"))

    def unpack(self) -> Self:
        return self._each(operator.methodcaller("unpack"))

    def _each(self, change: Callable[[Form], Any]) -> Self:
        parts = tuple(map(change, self.parts))
        same = all(new is old for new, old in zip(parts, self.parts, strict=True))
        return self if same else dataclasses.replace(self, parts=parts)

    def dense(self) -> Array:
        total = self.parts[0].dense()
        for part in self.parts[1:]:
            total = total + part.dense()
        return nearest_number(total, self.dtype)

    def describe(self) -> str:
        return " + ".join(part.describe() for part in self.parts)

    def one_per(self) -> str:
        return "; ".join(dict.fromkeys(filter(None, (part.one_per() for part in self.parts))))

    def relayout(self, change: Relayout) -> Form | None:
        return self._all(lambda part: part.relayout(change))

    def take_rows(self, rows: Int[Array, " R"]) -> Form | None:
        return self._all(lambda part: part.take_rows(rows))

    def unstack(self) -> Form | None:
        return self._all(lambda part: part.unstack())

    def prepack(self, view: MatrixView | None = None, *, traced: bool = False) -> Form:
        return self._each(lambda part: part.prepack(view, traced=traced))

    def product(self, x: Array, matmul: Callable[[Array, Any], Array]) -> Array:
        wide = wider(x.dtype, self.dtype, jnp.float32)
        return functools.reduce(jnp.add, (matmul(x, part).astype(wide) for part in self.parts))

    def spec(self, mesh: Any) -> tuple[Any, ...]:
        return self.parts[0].spec(mesh)

    def _all(self, change: Callable[[Form], Form | None]) -> Form | None:
        """Each part changed; None if one of them is."""
        parts = [part for part in map(change, self.parts) if part is not None]
        return dataclasses.replace(self, parts=tuple(parts)) if len(parts) == len(self.parts) else None

    def check_stored(self) -> None:
        check_float("dtype", self.dtype)
        if not self.parts:
            raise ValueError("parts: expected at least one form, got none")
        for i, part in enumerate(self.parts):
            with named(f"parts: {i}"):
                part.check_stored()
                if part.shape != self.shape:
                    raise ValueError(f"expected the shape {list(self.shape)} of the first, got {list(part.shape)}")
