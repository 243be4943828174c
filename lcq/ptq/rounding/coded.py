"""What rounding reads of a form and writes into it, whether codes are levels or steps of paths.

A product's weights [G, N, n] are `Codes`, or a `Trellis` whose paths run along the N inputs.
"""

import dataclasses
from typing import Any

from jax.typing import DTypeLike
from jaxtyping import Array, Float

from lcq.forms import Codes, Trellis

Coded = Codes | Trellis


def codes_of(form: Coded) -> Any:
    """What is chosen for each weight."""
    return form.steps if isinstance(form, Trellis) else form.codes


def with_codes(form: Coded, codes: Any) -> Coded:
    """The form with other codes, or None for them."""
    if isinstance(form, Trellis):
        return dataclasses.replace(form, steps=codes)
    return dataclasses.replace(form, codes=codes)


def tables(form: Coded) -> dict[str, Any]:
    """The arrays beside the codes, by name, that there are one of for each block."""
    names = ("scale",) if isinstance(form, Trellis) else ("scale", "zero", "levels")
    return {name: array for name in names if (array := getattr(form, name)) is not None}


def level_count(form: Coded) -> int:
    """How many levels a code chooses from."""
    return 1 << form.width if isinstance(form, Trellis) else form.size_of_table


def has_scale(form: Coded) -> bool:
    """Whether there is something to scale: not where levels are a fixed table."""
    return form.scale is not None or (isinstance(form, Codes) and form.levels is not None)


def unscaled(form: Coded, dtype: DTypeLike) -> Float[Array, "N n"]:
    """The weights for scales of one."""
    if isinstance(form, Trellis):
        return form.levels().astype(dtype)
    return dataclasses.replace(form, scale=None, dtype=str(dtype)).dense()
