"""Cast: the same numbers in a shorter floating-point format."""

from typing import Any, Self

import jax
import numpy as np
from jaxtyping import Array

from lcq.forms.base import Form, leafwise, register_form
from lcq.forms.dtypes import nearest_number
from lcq.forms.processes import on_host
from lcq.forms.validate import check_float, check_shape


@register_form
class Cast(Form):
    """The same numbers in a shorter floating-point format: Delta = values as `dtype`.

    Attributes:
        values: the leaf, rounded to the stored dtype.
    """

    values: Any = leafwise()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def bits(self) -> int:
        return self.values.size * self.values.dtype.itemsize * 8

    def pack(self) -> Self:
        return self if isinstance(self.values, np.ndarray) else jax.device_get(on_host(self))

    def unpack(self) -> Self:
        return self

    def dense(self) -> Array:
        return nearest_number(self.values, self.dtype)

    def describe(self) -> str:
        return f"values {self.values.dtype}"

    def check_stored(self) -> None:
        check_shape(self.values.shape)
        check_float("values", str(self.values.dtype))
        check_float("dtype", self.dtype)
