"""How each kind of equation hands factors on: what its results are scaled by if its operands are."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from lcq.tracing import compact
from lcq.tracing.equation import Equation
from lcq.tracing.factor_products import convolution, dot
from lcq.tracing.factors import Factors, Value, fills, fixed
from lcq.tracing.symbols import ANY

Why = Callable[[], str]

_ALIKE = {"add", "add_any", "sub", "max", "min", "select_n", "clamp", "rem"}
_COMPARED = {"eq", "ne", "lt", "le", "gt", "ge", "eq_to", "lt_to", "le_to", "sign"}
_EACH = {"neg", "abs", "real", "optimization_barrier", "pvary", "convert_element_type"}
_REDUCED = {"reduce_sum", "reduce_max", "reduce_min", "argmax", "argmin"}
_RUNNING = {"cumsum", "cummax", "cummin"}
_SIGNED = {"max", "min", "clamp", "abs", "reduce_max", "reduce_min", "argmax", "argmin", "cummax", "cummin", *_COMPARED}
_SIGNED |= {"reduce_window_max", "reduce_window_min"}
_WINDOWS = {"reduce_window_sum", "reduce_window_max", "reduce_window_min"}


def results(factors: Factors, eqn: Equation, ins: list[Value], why: Why) -> list[Value] | None:
    """What is known of the results of an equation; None if its operands have to stay as they are.

    Args:
        factors: found so far; grows.
        eqn: the equation.
        ins: its operands.
        why: names the equation.
    """
    name = eqn.primitive.name
    if not eqn.outvars or not any(factors.is_open(v) or (v.factors == ANY).any() or not v.factors.size for v in ins):
        return None
    signed = name in _SIGNED or any(value.infinite for value in ins)
    ins = [factors.opened(value, why) for value in ins] if name in _SIGNED else ins
    for value in ins if signed else ():
        factors.symbols.keep_sign(value.factors)
    if name in _EACH:
        inexact = all(jnp.issubdtype(var.aval.dtype, jnp.inexact) for var in eqn.outvars)
        pure = name == "convert_element_type"
        return [dataclasses.replace(v, pure=v.pure and pure, known=None) for v in ins] if inexact else None
    outs = _RULES.get(name, _moved)(factors, eqn, ins, why)
    for value in outs or () if signed else ():
        factors.symbols.keep_sign(value.factors)
        value.infinite = any(other.infinite for other in ins)
    return outs


def _shape(eqn: Equation) -> tuple[int, ...]:
    return tuple(eqn.outvars[0].aval.shape)


def _alike(factors: Factors, eqn: Equation, ins: list[Value], why: Why) -> list[Value]:
    """Operands that have to have the same factors; parameters take those of the others."""
    shape = _shape(eqn)
    if eqn.primitive.name == "select_n":
        factors.pin(ins[0], why)
        ins = ins[1:]
    ins = [value.raised(len(shape)) for value in ins]
    found = fixed(len(shape), ANY)
    for value in ins:
        if value.places is None:
            factors.symbols.equal(found, value.factors, lambda: f"{why()}, with what cannot be scaled")
            found = np.where(found == ANY, value.factors, found)
    for value in ins:
        if value.places is None:
            continue
        if (found == ANY).any():  # with nothing but zeros: a value of its own
            made = factors.opened(value, why).factors
            factors.symbols.equal(found, made, why)
            found = np.where(found == ANY, made, found)
        else:
            factors.use(value, "bias", found, fixed(len(shape)), why)
    return [Value(shape, found)]


def _compared(factors: Factors, eqn: Equation, ins: list[Value], why: Why) -> list[Value]:
    """Positive factors that are the same on both sides change no comparison."""
    _alike(factors, eqn, [factors.opened(value, why) for value in ins], why)
    return [Value(_shape(eqn), fixed(len(_shape(eqn))))]


def _multiplied(factors: Factors, eqn: Equation, ins: list[Value], why: Why) -> list[Value] | None:
    shape = _shape(eqn)
    rank = len(shape)
    x, y = (value.raised(rank) for value in ins)
    if eqn.primitive.name == "div" and (y.factors == ANY).any():
        return None
    if eqn.primitive.name == "div" and factors.is_open(y):
        factors.pin(y, why)
        y = Value(y.shape, fixed(rank), data=y.data)
    if x.places is not None and y.places is not None:
        return None
    if y.places is not None:
        x, y = y, x
    if x.places is not None:
        if y.data or factors.symbols.free(y.factors):
            return [_gain(factors, x, y, shape, why)]
        return [Value(shape, fixed(rank), x.path, x.places, False)]
    if (x.factors == ANY).all() or (y.factors == ANY).all():
        return [Value(shape, fixed(rank, ANY))]
    if factors.is_open(x) and factors.is_open(y):
        factors.pin(x, lambda: f"{why()}, of two that could be scaled")
    return [Value(shape, y.factors if factors.is_open(y) else x.factors)]


def _gain(factors: Factors, gain: Value, x: Value, shape: tuple[int, ...], why: Why) -> Value:
    """A parameter times data, element by element: it takes up any change of factors, if it has that many."""
    assert gain.places is not None
    if any(n > 1 and m == 1 for n, m in zip(x.factors.shape, gain.places.shape, strict=True)):
        factors.pin(gain, why)
        return Value(shape, x.factors)
    made = factors.symbols.fresh(gain.places.shape)
    factors.use(gain, "gain", made, x.factors, why)
    return Value(shape, made)


def _reduced(factors: Factors, eqn: Equation, ins: list[Value], why: Why) -> list[Value]:
    axes, shape = tuple(map(int, eqn.params["axes"])), _shape(eqn)
    left = factors.level(factors.opened(ins[0], why), axes, why).squeeze(axes)
    return [Value(shape, fixed(len(shape)) if eqn.primitive.name.startswith("arg") else left)]


def _running(factors: Factors, eqn: Equation, ins: list[Value], why: Why) -> list[Value]:
    return [Value(_shape(eqn), factors.level(factors.opened(ins[0], why), [eqn.params["axis"]], why))]


def _windows(factors: Factors, eqn: Equation, ins: list[Value], why: Why) -> list[Value]:
    value, shape, window = factors.opened(ins[0], why), _shape(eqn), eqn.params["window_dimensions"]
    padding = eqn.params["padding"]
    axes = [i for i, n in enumerate(shape) if window[i] > 1 or n != value.shape[i] or any(padding[i])]
    return [Value(shape, factors.level(value, axes, why))]


def _gathered(factors: Factors, eqn: Equation, ins: list[Value], why: Why) -> list[Value] | None:
    """Rows of a table, all of which have the same factors."""
    if fills(eqn):
        return None
    value, numbers, sizes, shape = ins[0], eqn.params["dimension_numbers"], eqn.params["slice_sizes"], _shape(eqn)
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    axes = [i for i, (size, n) in enumerate(zip(sizes, value.shape, strict=True)) if size < n or i in gone]
    if value.places is not None:
        found = factors.symbols.fresh(tuple(1 if i in axes else n for i, n in enumerate(value.places.shape)))
        factors.use(value, "lookup", found, fixed(value.rank), why)
    else:
        found = factors.level(value, axes, why)
    lengths = [1] * len(shape)
    for i, at in zip((i for i in range(value.rank) if i not in gone), numbers.offset_dims, strict=True):
        lengths[at] = found.shape[i]
    return [Value(shape, found.reshape(lengths))]


def _joined(factors: Factors, eqn: Equation, ins: list[Value], why: Why) -> list[Value]:
    values = [factors.opened(value, why) for value in ins]
    parts = [value.factors for value in values]
    if eqn.primitive.name == "stack":
        return [Value(_shape(eqn), compact.stacked(parts, values[0].shape, eqn.params["axis"]))]
    return [Value(_shape(eqn), compact.joined(parts, [value.shape for value in values], eqn.params["dimension"]))]


def _padded(factors: Factors, eqn: Equation, ins: list[Value], why: Why) -> list[Value] | None:
    if (ins[1].factors != ANY).any():
        return None
    value = factors.opened(ins[0], why)
    return [Value(_shape(eqn), compact.padded(eqn, value.factors, value.shape, ANY))]


def _moved(factors: Factors, eqn: Equation, ins: list[Value], why: Why) -> list[Value] | None:
    value, rest = ins[0], [other.known for other in ins[1:]]
    if eqn.primitive.name == "dynamic_slice" and any(start is None for start in rest):
        value, sizes = factors.opened(value, why, "lookup"), eqn.params["slice_sizes"]
        axes = [i for i, (size, n) in enumerate(zip(sizes, value.shape, strict=True)) if size < n]
        return [Value(tuple(sizes), factors.level(value, axes, why))]
    moved = compact.moved(eqn, value.factors, value.shape, rest)
    if moved is None:
        return None
    shapes = [tuple(var.aval.shape) for var in eqn.outvars]
    if value.places is None:
        return [Value(shape, compact.shrunk(a)) for shape, a in zip(shapes, moved, strict=True)]
    places = compact.moved(eqn, value.places, value.shape, rest)
    assert places is not None
    return [Value(shape, fixed(len(shape)), value.path, a, value.pure) for shape, a in zip(shapes, places, strict=True)]


_RULES: dict[str, Callable[..., list[Value] | None]] = {
    "dot_general": dot,
    "ragged_dot_general": dot,
    "conv_general_dilated": convolution,
    "mul": _multiplied,
    "div": _multiplied,
    **dict.fromkeys(_ALIKE, _alike),
    **dict.fromkeys(_COMPARED, _compared),
    **dict.fromkeys(_REDUCED, _reduced),
    **dict.fromkeys(_RUNNING, _running),
    **dict.fromkeys(_WINDOWS, _windows),
    "gather": _gathered,
    "concatenate": _joined,
    "stack": _joined,
    "pad": _padded,
}
