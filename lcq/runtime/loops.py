"""Loops and branches on forms, and what of a loop is done once, before it.

What a loop's body makes of forms alone is the same in each round: it is made before the loop. A kernel that a product
in the body would decode in each round is decoded before, too, as long as all such arrays of a loop take no more than
`held` bytes: a loop then takes the time of the dense one, and that memory. What does not fit stays on codes; so do few
rows by large codes, where to read the codes takes less time than to read a dense array, factors, which no product
decodes, and what a loop takes slice by slice, which is decoded once anyhow.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax

from lcq.kernels.words_xla import FEW
from lcq.runtime.traced_form import Pieces, TracedForm
from lcq.tracing import jaxpr
from lcq.tracing.equation import Body, Content, Equation, Frame
from lcq.tracing.jaxpr import CALLS, CUSTOM_GRADIENT, DATA_MOVEMENT, PRODUCTS, RAGGED

LARGE = 1 << 22
"""Weights from which few rows are multiplied faster with codes than with a dense array."""

_VARIES = object()
"""In place of a value that differs from round to round."""


class _Later:
    """Arrays that are the same in each round, made when a form meets them."""

    def __init__(self, make: Callable[[], list[Content]], number: int) -> None:
        self.make, self.number = make, number

    @property
    def value(self) -> Content:
        return self.make()[self.number]


def before(runner: Any, closed: Body, values: list[Content], frame: Frame) -> None:
    """Does what the body of a loop need do once; the runner finds it when it gets there.

    Args:
        runner: runs the function.
        closed: the body.
        values: its inputs, those that are fixed; None in place of the others.
        frame: the calls around the body's equations.
    """
    outermost, room = not runner.looping, runner.room
    runner.looping = True
    known = [_VARIES if value is None else value for value in values]
    jaxpr.evaluate(closed, known, functools.partial(_equation, runner, frame))
    if outermost:
        runner.looping, runner.room = False, room


def _equation(runner: Any, frame: Frame, eqn: Equation, ins: list[Content]) -> list[Content]:
    name, here = eqn.primitive.name, (*frame, eqn)
    varying = [_VARIES] * len(eqn.outvars)
    forms = any(isinstance(value, TracedForm | Pieces) for value in ins)
    fixed = not any(value is _VARIES for value in ins) and not eqn.effects
    closed = jaxpr.inner(eqn) if name in CALLS - CUSTOM_GRADIENT else None
    if closed is not None:
        return jaxpr.evaluate(closed, ins, functools.partial(_equation, runner, here))
    if forms and name in ("scan", "while"):
        _inner_loop(runner, eqn, ins, here)
        return varying
    if fixed and not forms:
        make = functools.cache(lambda: jaxpr.bind(eqn, [_now(value) for value in ins]))
        return [_Later(make, i) for i in range(len(eqn.outvars))]
    if not forms or name in CUSTOM_GRADIENT or name == "cond":
        return varying
    if fixed:
        return _once(runner, eqn, ins, frame)
    if name not in DATA_MOVEMENT and name != "gather":
        for i, value in enumerate(ins):
            if isinstance(value, TracedForm | Pieces) and (name not in PRODUCTS or not _stays(eqn, i, value)):
                runner.decode(value, (*here, i), "decoded" if name in (*PRODUCTS, RAGGED) else "dense")
    return varying


def _once(runner: Any, eqn: Equation, ins: list[Content], frame: Frame) -> list[Content]:
    """The equation before the loop, unless its arrays take more room than there is."""
    size = sum(var.aval.size * var.aval.dtype.itemsize for var in eqn.outvars)
    outs = None
    if eqn.primitive.name in (*DATA_MOVEMENT, "concatenate", "stack"):
        outs = runner.on_forms(eqn, [_now(value) for value in ins], (*frame, eqn))
    if outs is None:
        if size > runner.room:
            return [_VARIES] * len(eqn.outvars)
        runner.room -= size
        outs = runner.equation(frame, eqn, [_now(value) for value in ins])
    runner.done[(*frame, eqn)] = outs
    return outs


def _now(value: Content) -> Content:
    return value.value if isinstance(value, _Later) else value


def _stays(eqn: Equation, side: int, value: TracedForm | Pieces) -> bool:
    """Whether a product in a loop reads codes in each round because that is faster than a dense array."""
    parts = value.parts if isinstance(value, Pieces) else (value,)
    decoding = {part.form.decoding for part in parts if isinstance(part, TracedForm)}
    if decoding == {"never"}:
        return True
    x = eqn.invars[1 - side].aval.shape
    if not jaxpr.is_known(x) or eqn.primitive.name != "dot_general":
        return False
    inputs = 1
    for axis in eqn.params["dimension_numbers"][0][1 - side]:
        inputs *= x[axis]
    rows = eqn.invars[1 - side].aval.size // inputs
    return decoding == {"many rows"} and rows <= FEW and eqn.invars[side].aval.size >= LARGE


def _inner_loop(runner: Any, eqn: Equation, ins: list[Content], frame: Frame) -> None:
    if eqn.primitive.name == "scan":
        closed, fixed, _ = jaxpr.scan_of(eqn)
        rest = len(ins) - fixed
        jaxpr.evaluate(closed, [*ins[:fixed], *[_VARIES] * rest], functools.partial(_equation, runner, frame))
        return
    first, second = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    carry = [_VARIES] * (len(ins) - first - second)
    for part, consts in (("cond", ins[:first]), ("body", ins[first : first + second])):
        closed = eqn.params[f"{part}_jaxpr"]
        jaxpr.evaluate(closed, [*consts, *carry], functools.partial(_equation, runner, (*frame, part)))


def _scan(runner: Any, eqn: Equation, ins: list[Content], frame: Frame) -> list[Content]:
    """The scan again, its body on forms: those under it are taken apart, others are constants to it."""
    closed, fixed, carries = jaxpr.scan_of(eqn)
    ends = (*frame, "in")
    carry = runner.dense_all(ins[fixed : fixed + carries], ends)
    xs = [_apart(runner, value, (*ends, "xs", i)) for i, value in enumerate(ins[fixed + carries :])]
    before(runner, closed, [*ins[:fixed], *[None] * (len(ins) - fixed)], frame)

    def body(carry: list[Content], xs: list[Content]) -> tuple[list[Content], list[Content]]:
        outs = runner.run(closed, [*ins[:fixed], *carry, *xs], frame)
        return outs[:carries], outs[carries:]

    how = {key: eqn.params[key] for key in ("length", "reverse", "unroll")}
    carry, ys = jax.lax.scan(body, carry, xs, **how)
    return [*carry, *ys]


def _apart(runner: Any, value: Content, frame: Frame) -> Content:
    """What a scan takes apart: an array, or the stacked forms of a form's slices."""
    slices = value.stacked() if isinstance(value, TracedForm) else None
    return runner.dense(value, frame) if slices is None else slices


def _while(runner: Any, eqn: Equation, ins: list[Content], frame: Frame) -> list[Content] | None:
    """The loop again, forms being constants to it; one that was mapped over its condition is left as it is."""
    first, second = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    condition, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
    if jaxpr.opened(condition)[0].outvars[0].aval.shape:
        return None
    begin = runner.dense_all(ins[first + second :], (*frame, "in"))
    for closed, consts, part in ((condition, ins[:first], "cond"), (body, ins[first : first + second], "body")):
        before(runner, closed, [*consts, *[None] * len(begin)], (*frame, part))

    def go_on(carry: list[Content]) -> Content:
        return runner.run(condition, [*ins[:first], *carry], (*frame, "cond"))[0]

    def step(carry: list[Content]) -> list[Content]:
        return runner.run(body, [*ins[first : first + second], *carry], (*frame, "body"))

    return jax.lax.while_loop(go_on, step, begin)


def _cond(runner: Any, eqn: Equation, ins: list[Content], frame: Frame) -> list[Content]:
    index, *operands = ins
    branches = [
        functools.partial(lambda i, closed, *ins: runner.run(closed, ins, (*frame, i)), i, closed)
        for i, closed in enumerate(eqn.params["branches"])
    ]
    return jax.lax.switch(index.astype("int32"), branches, *operands)


CONTROL = {"scan": _scan, "while": _while, "cond": _cond}
"""How loops and branches run: (runner, equation, inputs, frame) -> outputs, None if forms have to be dense for it."""
