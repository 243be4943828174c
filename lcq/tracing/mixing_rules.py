"""How each kind of equation hands coordinates on: linearly, telling some apart, or not at all."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from lcq.tracing import compact
from lcq.tracing.equation import Equation
from lcq.tracing.factor_products import Dims
from lcq.tracing.factors import fills, fixed, spread
from lcq.tracing.mixed import Mixed, Mixing, Why
from lcq.tracing.positions import ELEMENTWISE
from lcq.tracing.symbols import ANY, ONE

_EACH = {"neg", "real", "optimization_barrier", "pvary", "convert_element_type"}
_SELECTING = {"slice", "split", "dynamic_slice", "unstack", "squeeze"}


def results(mixing: Mixing, eqn: Equation, ins: list[Mixed], why: Why) -> list[Mixed] | None:
    """What is known of the results of an equation; None if its operands have to stay as they are.

    Args:
        mixing: found so far; grows.
        eqn: the equation.
        ins: its operands.
        why: names the equation.
    """
    name = eqn.primitive.name
    moves = name in ("broadcast_in_dim", "reshape", "transpose", "squeeze", "expand_dims")
    if not eqn.outvars or not (moves or any(mixing.is_open(v) or (v.factors == ANY).any() for v in ins)):
        return None
    if any(value.square for value in ins) and name not in ("reduce_sum", "mul", "div", *_EACH):
        return None
    if name in _EACH:
        if not all(jnp.issubdtype(var.aval.dtype, jnp.inexact) for var in eqn.outvars):
            return None
        return [dataclasses.replace(value, known=None) for value in ins]
    rule = _RULES.get(name, _moved)
    return rule(mixing, eqn, ins, why)


def plain(eqn: Equation, ins: list[Mixed], i: int) -> Mixed:
    """A result without coordinates."""
    shape = tuple(eqn.outvars[i].aval.shape)
    depends = tuple(n > 1 for n in shape)
    running = eqn.primitive.name.startswith("cum")
    if eqn.primitive.name in ELEMENTWISE and not running and all(value.rank in (0, len(shape)) for value in ins):
        depends = _either(ins, len(shape))
    elif eqn.primitive.name.startswith("reduce_") and "axes" in eqn.params and ins:
        axes = set(map(int, eqn.params["axes"]))
        depends = tuple(d for axis, d in enumerate(ins[0].depends) if axis not in axes)
    return Mixed(shape, fixed(len(shape)), depends=depends)


def _either(ins: list[Mixed], rank: int) -> tuple[bool, ...]:
    full = [value.depends for value in ins if value.rank == rank]
    return tuple(any(depends) for depends in zip(*full, strict=True)) if full else (False,) * rank


def _shape(eqn: Equation) -> tuple[int, ...]:
    return tuple(eqn.outvars[0].aval.shape)


def _raised(value: Mixed, rank: int) -> Mixed:
    raised = value.raised(rank)
    assert isinstance(raised, Mixed)
    return raised if value.rank == rank else dataclasses.replace(raised, depends=(False,) * rank)


def _added(mixing: Mixing, eqn: Equation, ins: list[Mixed], why: Why) -> list[Mixed] | None:
    shape = _shape(eqn)
    rank = len(shape)
    ins = [_raised(value, rank) for value in ins]
    if all(value.places is not None for value in ins):
        first = ins[0]
        assert first.places is not None
        made = mixing.fresh(first.places.shape)
        mixing.use(first, "bias", made, fixed(rank), why)
        ins = [Mixed(first.shape, made, depends=first.depends), *ins[1:]]
    found = fixed(rank, ANY)
    for value in ins:
        if value.places is None:
            mixing.symbols.equal(found, value.factors, lambda: f"{why()}, with what cannot be mixed")
            found = np.where(found == ANY, value.factors, found)
    for value in ins:
        if value.places is not None:
            if (found == ANY).any():  # with zeros: coordinates of its own
                found = np.where(found == ANY, mixing.fresh(value.places.shape), found)
            mixing.use(value, "bias", found, fixed(rank), why)
    return [Mixed(shape, found, depends=_either(ins, rank))]


def _multiplied(mixing: Mixing, eqn: Equation, ins: list[Mixed], why: Why) -> list[Mixed] | None:
    """By what does not differ between coordinates that are mixed; two with the same ones make a square."""
    shape = _shape(eqn)
    rank = len(shape)
    x, y = (_raised(value, rank) for value in ins)
    depends = _either([x, y], rank)
    if eqn.primitive.name == "div" and (mixing.is_open(y) or (y.factors == ANY).any()):
        return None
    free = [mixing.symbols.free(value.factors) for value in (x, y)]
    if all(free):
        if x.square or y.square:
            return None
        mixing.symbols.equal(x.factors, y.factors, why)
        return [Mixed(shape, x.factors, depends=depends, square=True)]
    if y.places is not None or free[1]:
        x, y, free = y, x, free[::-1]
    if y.places is not None or (x.places is not None and (y.data or any(y.depends))):
        mixing.pin(x, why)  # a gain that differs
        mixing.pin(y, why)
        return [Mixed(shape, fixed(rank), depends=depends)]
    if x.places is not None:
        return [Mixed(shape, fixed(rank), x.path, x.places, False, depends=x.depends)]
    if (x.factors == ANY).all() or (y.factors == ANY).all():
        return [Mixed(shape, fixed(rank, ANY), depends=depends)]
    mixing.tell_apart(x.factors, [axis for axis, d in enumerate(y.depends) if d])
    if any(d and x.factors.shape[axis] > 1 and free[0] for axis, d in enumerate(y.depends)):
        _pin_lines(mixing, x.factors, [axis for axis, d in enumerate(y.depends) if d], why)
    return [Mixed(shape, x.factors, depends=depends, square=x.square)]


def _pin_lines(mixing: Mixing, ids: np.ndarray, axes: list[int], why: Why) -> None:
    """Nothing is left to mix where all axes along which coordinates differ are told apart."""
    if all(axis in axes for axis, n in enumerate(ids.shape) if n > 1):
        mixing.symbols.pin(ids, why)


def _squared(mixing: Mixing, eqn: Equation, ins: list[Mixed], why: Why) -> list[Mixed] | None:
    (x,) = ins
    if x.square or x.places is not None or (eqn.primitive.name == "integer_pow" and eqn.params["y"] != 2):
        return None
    return [Mixed(x.shape, x.factors, depends=x.depends, square=True)]


def _summed(mixing: Mixing, eqn: Equation, ins: list[Mixed], why: Why) -> list[Mixed] | None:
    """The sum of squares over all coordinates is the same; of anything else, along axes without coordinates."""
    value, axes = ins[0], tuple(map(int, eqn.params["axes"]))
    if value.places is not None:
        return None
    depends = tuple(d for axis, d in enumerate(value.depends) if axis not in axes)
    varying = [axis for axis, n in enumerate(value.factors.shape) if n > 1]
    if value.square:
        mixing.part(value.factors)
        mixing.tell_apart(value.factors, [axis for axis in varying if axis not in axes])
        if not set(varying) & set(axes):
            return None
        return [Mixed(_shape(eqn), fixed(len(depends)), depends=depends)]
    if set(varying) & set(axes):
        return None
    return [Mixed(_shape(eqn), value.factors.squeeze(axes), depends=depends)]


def _selected(mixing: Mixing, eqn: Equation, ins: list[Mixed], why: Why) -> list[Mixed] | None:
    """Where a mask chooses: coordinates for which it differs stay."""
    rank = len(_shape(eqn))
    mask = _raised(ins[0], rank)
    axes = [axis for axis, d in enumerate(mask.depends) if d]
    for value in ins[1:]:
        mixing.tell_apart(value.factors, axes)
        _pin_lines(mixing, value.factors, axes, why)
    return _added(mixing, eqn, ins[1:], why)


def _gathered(mixing: Mixing, eqn: Equation, ins: list[Mixed], why: Why) -> list[Mixed] | None:
    if fills(eqn):
        return None
    value, numbers, sizes, shape = ins[0], eqn.params["dimension_numbers"], eqn.params["slice_sizes"], _shape(eqn)
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    axes = {i for i, (size, n) in enumerate(zip(sizes, value.shape, strict=True)) if size < n or i in gone}
    if value.places is None:
        if any(value.factors.shape[axis] > 1 for axis in axes):
            return None
        found = value.factors
    else:
        found = mixing.fresh(tuple(1 if i in axes else n for i, n in enumerate(value.places.shape)))
        mixing.use(value, "lookup", found, fixed(value.rank), why)
    lengths = [1] * len(shape)
    for i, at in zip((i for i in range(value.rank) if i not in gone), numbers.offset_dims, strict=True):
        lengths[at] = found.shape[i]
    return [Mixed(shape, found.reshape(lengths), depends=tuple(n > 1 for n in shape))]


def _dot(mixing: Mixing, eqn: Equation, ins: list[Mixed], why: Why) -> list[Mixed] | None:
    dims = Dims(eqn, ins)
    if any(dims.experts):
        return None
    shape = _shape(eqn)
    rank, many = len(shape), len(dims.batch[0])
    side = next((s for s in (1, 0) if ins[s].places is not None), None)
    free = [mixing.symbols.free(value.factors) for value in ins[:2]]
    if side is None and all(free):
        return _inner(mixing, eqn, ins, dims, why)
    if side is None:
        side = 1 if free[1] else 0
        value = ins[side]
        if any(value.factors.shape[axis] > 1 for axis in dims.contract[side]):
            return None
        mixing.tell_apart(value.factors, dims.batch[side])
        above = value.factors
    else:
        value, other = ins[side], ins[1 - side]
        if other.places is not None or not value.pure or not dims.contract[0]:
            return None
        assert value.places is not None
        if any(other.factors.shape[axis] > 1 for axis in dims.free[1 - side]):
            mixing.pin(other, why)
        into = np.where(other.factors == ANY, ONE, other.factors)
        mixing.tell_apart(into, dims.batch[1 - side])
        order = [*dims.batch[1 - side], *dims.contract[1 - side]]
        if any(into.shape[axis] > 1 for axis in dims.free[1 - side]):
            into = fixed(other.rank)
        into = into.transpose([*order, *dims.free[1 - side]]).reshape([into.shape[i] for i in order])
        below = spread(into, (*dims.batch[side], *dims.contract[side]), value.rank)
        lengths = tuple(1 if i in dims.contract[side] else n for i, n in enumerate(value.places.shape))
        above = mixing.fresh(lengths, dims.batch[side])
        mixing.use(value, "product", above, below, why)
    kept = [*dims.batch[side], *dims.free[side]]
    rest = [i for i in range(ins[side].rank) if i not in kept]
    above = above.transpose([*kept, *rest]).reshape([above.shape[i] for i in kept])
    start = many + (len(dims.free[0]) if side else 0)
    onto = (*range(many), *range(start, start + len(dims.free[side])))
    return [Mixed(shape, spread(above, onto, rank), depends=tuple(n > 1 for n in shape))]


def _inner(mixing: Mixing, eqn: Equation, ins: list[Mixed], dims: Dims, why: Why) -> list[Mixed] | None:
    """Inner products of two that are mixed alike."""
    if any(ins[s].factors.shape[axis] > 1 for s in (0, 1) for axis in dims.free[s]):
        return None
    flat = []
    for s in (0, 1):
        order = [*dims.batch[s], *dims.contract[s]]
        ids = ins[s].factors.transpose([*order, *dims.free[s]])
        ids = ids.reshape(ids.shape[: len(order)])
        if 1 in ids.shape[len(dims.batch[s]) :]:
            return None
        mixing.part(ids)
        mixing.tell_apart(ids, range(len(dims.batch[s])))
        flat.append(ids)
    mixing.symbols.equal(flat[0], flat[1], why)
    shape = _shape(eqn)
    return [Mixed(shape, fixed(len(shape)), depends=tuple(n > 1 for n in shape))]


def _convolved(mixing: Mixing, eqn: Equation, ins: list[Mixed], why: Why) -> list[Mixed] | None:
    x, w = ins
    params, spec = eqn.params, eqn.params["dimension_numbers"]
    if w.places is None or x.places is not None or not w.pure:
        return None
    if params["batch_group_count"] > 1 or params["feature_group_count"] > 1:
        return None
    channel, out, inside = spec.lhs_spec[1], spec.rhs_spec[0], spec.rhs_spec[1]
    if any(n > 1 for axis, n in enumerate(x.factors.shape) if axis != channel):
        return None
    into = np.where(x.factors == ANY, ONE, x.factors).reshape(-1)
    above = mixing.fresh(tuple(n if i == out else 1 for i, n in enumerate(w.places.shape)))
    mixing.use(w, "product", above, spread(into, (inside,), w.rank), why)
    shape = _shape(eqn)
    made = spread(above.reshape(-1), (spec.out_spec[1],), x.rank)
    return [Mixed(shape, made, depends=tuple(n > 1 for n in shape))]


def _joined(mixing: Mixing, eqn: Equation, ins: list[Mixed], why: Why) -> list[Mixed] | None:
    if any(value.places is not None for value in ins):
        return None
    shape, parts = _shape(eqn), [value.factors for value in ins]
    if eqn.primitive.name == "stack":
        made = compact.stacked(parts, ins[0].shape, eqn.params["axis"])
    else:
        made = compact.joined(parts, [value.shape for value in ins], eqn.params["dimension"])
    return [Mixed(shape, made, depends=tuple(n > 1 for n in shape))]


def _moved(mixing: Mixing, eqn: Equation, ins: list[Mixed], why: Why) -> list[Mixed] | None:
    value, rest = ins[0], [other.known for other in ins[1:]]
    ids = compact.moved(eqn, value.factors, value.shape, rest)
    if ids is None:
        return None
    shapes = [tuple(var.aval.shape) for var in eqn.outvars]
    if eqn.primitive.name in _SELECTING and mixing.symbols.free(value.factors):
        for each in ids:
            mixing.part(each)
    depends = [_depends(eqn, value, shape) for shape in shapes]
    if value.places is None:
        return [
            Mixed(shape, compact.shrunk(a), depends=d, square=value.square)
            for shape, a, d in zip(shapes, ids, depends, strict=True)
        ]
    places = compact.moved(eqn, value.places, value.shape, rest)
    assert places is not None
    return [
        Mixed(shape, fixed(len(shape)), value.path, a, value.pure, depends=d)
        for shape, a, d in zip(shapes, places, depends, strict=True)
    ]


def _depends(eqn: Equation, value: Mixed, shape: tuple[int, ...]) -> tuple[bool, ...]:
    """On which axes a moved value may depend."""
    match eqn.primitive.name:
        case "broadcast_in_dim":
            onto = dict(zip(map(int, eqn.params["broadcast_dimensions"]), value.depends, strict=True))
            return tuple(onto.get(axis, False) for axis in range(len(shape)))
        case "transpose":
            return tuple(value.depends[axis] for axis in eqn.params["permutation"])
        case "squeeze":
            return tuple(d for axis, d in enumerate(value.depends) if axis not in eqn.params["dimensions"])
        case "reshape" if not any(value.depends):
            return (False,) * len(shape)
        case "reshape" if [n for n in value.shape if n > 1] == [n for n in shape if n > 1]:
            long = iter([d for n, d in zip(value.shape, value.depends, strict=True) if n > 1])
            return tuple(n > 1 and next(long) for n in shape)
    return value.depends if value.shape == shape else tuple(n > 1 for n in shape)


_RULES: dict[str, Callable[..., list[Mixed] | None]] = {
    **dict.fromkeys(("add", "add_any", "sub"), _added),
    "mul": _multiplied,
    "div": _multiplied,
    "square": _squared,
    "integer_pow": _squared,
    "reduce_sum": _summed,
    "select_n": _selected,
    "gather": _gathered,
    "dot_general": _dot,
    "ragged_dot_general": _dot,
    "conv_general_dilated": _convolved,
    "concatenate": _joined,
    "stack": _joined,
}
