"""Rounding to nearest: every weight for itself."""

import dataclasses
from typing import Any

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

    def prepare(self, w: Float[Array, "N n"], statistics: Statistics) -> Any:
        del statistics
        return w.astype(compute_dtype(w.dtype))

    def solve(self, prepared: Any, form: Codes, key: Any = None) -> Codes:
        del key
        return dataclasses.replace(form, codes=choose_all(prepared, form))
