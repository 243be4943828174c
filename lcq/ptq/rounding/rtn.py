"""Rounding to nearest: every weight for itself."""

import dataclasses
from typing import ClassVar

from jaxtyping import Array, Float

from lcq.forms import Codes
from lcq.forms.blocks import compute_dtype
from lcq.ptq.rounding.base import ROUNDING_METHODS, Rounding
from lcq.ptq.rounding.codebook import choose_all
from lcq.ptq.statistics import Statistics


@ROUNDING_METHODS.register("rtn")
@dataclasses.dataclass(frozen=True)
class RTN(Rounding):
    """Every weight to its nearest level, q_t = Q(w_t)."""

    independent: ClassVar[bool] = True

    def prepare(self, w: Float[Array, "N n"], statistics: Statistics) -> Array:
        del statistics
        return w.astype(compute_dtype(w.dtype))

    def solve(self, prepared: Array, form: Codes, key: Array | None = None) -> Codes:
        del key
        return dataclasses.replace(form, codes=choose_all(prepared, form))
