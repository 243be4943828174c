"""Why a parameter cannot be followed to products, and what to do about it: the words of `trace`'s errors."""

import re

from lcq.tracing.equation import Equation
from lcq.tracing.jaxpr import OPAQUE, PRODUCTS, where


def cannot_follow(path: str, way: str, eqn: Equation | None, source: str | None) -> str:
    """What a leaf met on its way, an equation or (None) the end of the function."""
    if eqn is None:
        return f"{path}: expected a leaf that only products use, got {way} as an output; {remedy(path)}"
    name = eqn.primitive.name
    if name in OPAQUE:
        first = "write it as a lax.scan or without control flow, or "
    elif name in PRODUCTS:
        first = "it is multiplied with a parameter, or not contracted: fold the two before, or "
    elif name == "gather":
        first = "a lookup can only be rounded to nearest: "
    else:
        first = "fold this into the parameter before, or "
    got = f"{way} -> {name} at {source or where(eqn)}"
    return f"{path}: expected a leaf that only products use, got {got}; {first}{remedy(path)}"


def shared_in_part(path: str, way: str, name: str, source: str, seen: int, size: int) -> str:
    """A product that uses some weights which another has used, and some which none has."""
    return (
        f"{path}: expected products that share all or none of their weights, got {way} -> {name} at {source} with "
        f"{seen} of {size} used before; {remedy(path)}"
    )


def not_whole(path: str, reached: int, size: int) -> str:
    """A leaf of which not every weight is in a product."""
    return (
        f"{path}: expected a leaf that products use, got {reached} of {size} weights in products (is it closed over, "
        f"or unused?); pass it through params, or {remedy(path)}"
    )


def remedy(path: str) -> str:
    """What helps whatever the leaf has met."""
    pattern = re.escape(path)
    return (
        f"round it to nearest before the walk, quantize(..., rtn=[lcq.Rule({pattern!r}, scheme)]), or exclude it "
        f"with lcq.Rule({pattern!r}, None) before that rule"
    )
