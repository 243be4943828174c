"""Sum: several forms added together."""

import dataclasses
import operator
from collections.abc import Callable
from typing import Any, Self

from jaxtyping import Array

from lcq.forms.base import Form, register_form
from lcq.forms.dtypes import nearest_number
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

    def check_stored(self) -> None:
        check_float("dtype", self.dtype)
        if not self.parts:
            raise ValueError("parts: expected at least one form, got none")
        for i, part in enumerate(self.parts):
            with named(f"parts: {i}"):
                part.check_stored()
                if part.shape != self.shape:
                    raise ValueError(f"expected the shape {list(self.shape)} of the first, got {list(part.shape)}")
