"""Rounding to nearest: every weight for itself."""

import dataclasses
from typing import ClassVar

from jaxtyping import Array, Float

from lcq.forms import Trellis
from lcq.forms.blocks import compute_dtype
from lcq.ptq.rounding.base import ROUNDING_METHODS, Rounding
from lcq.ptq.rounding.codebook import choose_all
from lcq.ptq.rounding.coded import Coded
from lcq.ptq.rounding.paths import nearest_paths
from lcq.ptq.statistics import Statistics


@ROUNDING_METHODS.register("rtn")
@dataclasses.dataclass(frozen=True)
class RTN(Rounding):
    """Every weight to its nearest level, q_t = Q(w_t); paths to those nearest to all of their weights."""

    independent: ClassVar[bool] = True

    def prepare(self, w: Float[Array, "N n"], statistics: Statistics) -> Array:
        del statistics
        return w.astype(compute_dtype(w.dtype))

    def solve(self, prepared: Array, form: Coded, key: Array | None = None) -> Coded:
        del key
        if isinstance(form, Trellis):
            return nearest_paths(prepared, form)
        return dataclasses.replace(form, codes=choose_all(prepared, form))

    def on_paths(self) -> "RTN":
        return self
