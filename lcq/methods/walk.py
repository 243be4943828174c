"""One pass over a net with two values per variable: in the original net, and in the one whose weights are replaced.

The flat equations of a traced function are cut at its products into pieces, each a compiled function of what lives
across it; equal pieces (the blocks of a deep net) share one compilation. At each product the walk stops, hands over
the inputs of both nets, takes new weights, and goes on. So a net of L layers costs two forward passes, not L.
"""

import functools
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lcq.dtypes import wider
from lcq.products import Product
from lcq.trace import Program


class Visit:
    """A product that the walk has reached.

    Attributes:
        product: which.
        inputs: for every batch the data operand in the original net and in the other; the same object while equal.
    """

    def __init__(self, walk: "_Walk", product: Product, inputs: list[tuple[Any, Any]]) -> None:
        self.product, self.inputs, self._walk = product, inputs, walk
        self.results: list[Any] | None = None

    def finish(self, shift: Array | None = None) -> float:
        """Makes the product in both nets, with `shift` [G, n] added in the other, and goes on from there.

        Returns:
            ||Y - Y'||^2 / ||Y||^2 over all batches, Y' the result in the other net.
        """
        self.results, error = self._walk.multiply(self.product, self.inputs, shift)
        return error


def walk(
    program: Program, original: dict[str, Any], other: dict[str, Any], batches: Sequence[Any], *, host: bool = True
) -> Iterator[Visit]:
    """Yields every product in order; the caller may replace `other[path]` and must call `finish` before the next.

    Args:
        program: a traced function.
        original: its parameters by path.
        other: the other net's, changed by the caller as the walk goes on.
        batches: of equal shapes.
        host: whether what lives between pieces is kept in the host's memory instead of the accelerator's: for each
            batch two sets of activations, never more than one piece's on the device.
    """
    yield from _Walk(program, original, other, batches, host).run()


class _Walk:
    def __init__(
        self, program: Program, original: dict[str, Any], other: dict[str, Any], batches: Sequence[Any], host: bool
    ) -> None:
        self.program, self.original, self.other = program, original, other
        self.host = host and jax.default_backend() != "cpu"
        shared, self.pieces = _cut(program)
        params = len(program.paths)
        variables = program.jaxpr.invars[:params]
        envs: list[dict[Any, Any]] = []
        for values in (original, other):
            env = dict(zip(program.jaxpr.constvars, program.consts, strict=True))
            env.update(zip(variables, (values[path] for path in program.paths), strict=True))
            ins = [env[var] for var in shared.ins]
            if not envs or any(a is not envs[0][var] for a, var in zip(ins, shared.ins, strict=True)):
                made = shared.function(*ins)
            env.update(zip(shared.outs, made, strict=True))
            envs.append(env)
        data = [dict(zip(program.jaxpr.invars[params:], jax.tree.leaves(batch), strict=True)) for batch in batches]
        self.streams = [tuple(env | batch for env in envs) for batch in data]

    def run(self) -> Iterator[Visit]:
        for piece, product in zip(self.pieces, self.program.products, strict=True):
            for stream in self.streams:
                ins = [[env[var] for var in piece.ins] for env in stream]
                first = self._keep(piece.function(*ins[0]))
                same = all(a is b for a, b in zip(*ins, strict=True))
                second = first if same else self._keep(piece.function(*ins[1]))
                for env, made in zip(stream, (first, second), strict=True):
                    env.update(zip(piece.outs, made, strict=True))
                    for var in piece.spent:
                        del env[var]
            visit = Visit(self, product, [(one[piece.x], two[piece.x]) for one, two in self.streams])
            yield visit
            if visit.results is None:
                raise RuntimeError(f"{product.path}: wanted Visit.finish before the next product")
            for stream, made in zip(self.streams, visit.results, strict=True):
                for env, result in zip(stream, made, strict=True):
                    env[piece.result] = result
                    for var in piece.dead:
                        del env[var]
            del visit

    def multiply(self, product: Product, inputs: list[Any], shift: Array | None) -> tuple[list[Any], float]:
        function = _multiplier(Structure(product.structure, product))
        w, v = (product.weight.of(values[product.path]) for values in (self.original, self.other))
        results, sums = [], []
        for x, y in inputs:
            *made, squares = function(x, y, w, v, shift)
            results.append(self._keep(made))
            sums.append(squares)
        error, norm, size = np.asarray(jax.device_get(sums), np.float64).T
        whole = (norm * size**2).sum()
        return results, float((error * size**2).sum() / whole) if whole > 0 else 0.0

    def _keep(self, values: Sequence[Any]) -> Sequence[Any]:
        return jax.device_get(values) if self.host else values


@functools.lru_cache(maxsize=256)
def _multiplier(key: "Structure") -> Any:
    """The product in both nets and ||Y - Y'||^2/s^2, ||Y||^2/s^2, s = max |Y|, compiled once for its kind."""
    product: Product = key.thing

    @jax.jit
    def multiply(x: Any, y: Any, w: Any, v: Any, shift: Any) -> Any:
        first, second = product(x, w), product(y, v)
        if shift is not None:
            second = second + product.spread(shift).astype(second.dtype)
        wide = first.astype(wider(first.dtype, jnp.float32))
        size = jnp.maximum(jnp.abs(wide).max(), jnp.finfo(wide.dtype).tiny)  # or squares could overflow
        return (
            first,
            second,
            jnp.stack([(((wide - second.astype(wide.dtype)) / size) ** 2).sum(), ((wide / size) ** 2).sum(), size]),
        )

    return multiply


class _Piece(NamedTuple):
    """Equations between two products.

    Attributes:
        function: of `ins`, compiled.
        ins: variables it needs.
        outs: variables it makes that something later needs.
        x: the data operand of the product after it.
        result: the result of that product.
        spent: variables, of those there are, that neither that product nor anything later needs.
        dead: those that nothing needs after that product.
    """

    function: Any
    ins: list[Any]
    outs: list[Any]
    x: Any = None
    result: Any = None
    spent: tuple[Any, ...] = ()
    dead: tuple[Any, ...] = ()


def _cut(program: Program) -> tuple[_Piece, list[_Piece]]:
    """The equations without data behind them, and those between products; only what a product depends on."""
    eqns = program.jaxpr.eqns
    numbers = [program.product_of(eqn) for eqn in eqns]
    needed: set[Any] = set()
    alive = [False] * len(eqns)
    for i in reversed(range(len(eqns))):
        if numbers[i] is not None:
            alive[i] = True
            needed.add(eqns[i].invars[0])
        elif eqns[i].effects or any(var in needed for var in eqns[i].outvars):
            alive[i] = True
            needed.update(_variables(eqns[i]))
    batch = program.jaxpr.invars[len(program.paths) :]
    data = set(batch)
    shared: list[Any] = []
    parts: list[list[Any]] = [[]]
    products = []
    for eqn, number, live in zip(eqns, numbers, alive, strict=True):
        behind = number is not None or any(var in data for var in _variables(eqn))
        data.update(eqn.outvars if behind else ())
        if number is not None:
            products.append(eqn)
            parts.append([])
        elif live:
            (parts[-1] if behind else shared).append(eqn)
    last: dict[Any, float] = {}
    for k, (part, product) in enumerate(zip(parts, products, strict=False)):
        last.update({var: k for eqn in part for var in _variables(eqn)})
        last[product.invars[0]] = k + 0.5
    there = set(batch)
    pieces = []
    for k, (part, product) in enumerate(zip(parts, products, strict=False)):
        piece = _piece(part, {var for var, where in last.items() if where > k})
        there.update(piece.outs)
        spent = tuple(var for var in there if last.get(var, -1) <= k)
        there.difference_update(spent)
        there.add(product.outvars[0])
        dead = tuple(var for var in there if last.get(var, -1) < k + 1)
        there.difference_update(dead)
        pieces.append(piece._replace(x=product.invars[0], result=product.outvars[0], spent=spent, dead=dead))
    return _piece(shared, last), pieces


def _piece(eqns: Sequence[Any], wanted: Collection[Any]) -> _Piece:
    """Compiles equations to a function of what they do not make themselves."""
    made = [var for eqn in eqns for var in eqn.outvars]
    inside = set(made)
    ins = list(dict.fromkeys(var for eqn in eqns for var in _variables(eqn) if var not in inside))
    outs = [var for var in made if var in wanted]
    number = {var: i for i, var in enumerate([*ins, *made])}
    structure = [
        (
            eqn.primitive,
            eqn.params,
            [var.val if hasattr(var, "val") else number[var] for var in eqn.invars],
            [number[var] for var in eqn.outvars],
        )
        for eqn in eqns
    ]
    key = Structure((structure, [var.aval for var in ins], [number[var] for var in outs]), (eqns, ins, outs))
    return _Piece(_compiled(key), ins, outs)


@functools.lru_cache(maxsize=1024)
def _compiled(key: "Structure") -> Any:
    eqns, ins, outs = key.thing

    @jax.jit
    def piece(*values: Any) -> list[Any]:
        env = dict(zip(ins, values, strict=True))
        for eqn in eqns:
            with eqn.ctx.manager:
                made = eqn.primitive.bind(
                    *(var.val if hasattr(var, "val") else env[var] for var in eqn.invars),
                    **eqn.primitive.get_bind_params(eqn.params),
                )
            env.update(zip(eqn.outvars, made if eqn.primitive.multiple_results else [made], strict=True))
        return [env[var] for var in outs]

    return piece


def _variables(eqn: Any) -> list[Any]:
    """The operands that are not literals."""
    return [var for var in eqn.invars if not hasattr(var, "val")]


class Structure:
    """Equal for things of equal structure, so that a cache compiles them once; holds one of them."""

    def __init__(self, structure: Any, thing: Any) -> None:
        self.structure, self.thing = _describe(structure), thing

    def __hash__(self) -> int:
        return hash(self.structure)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Structure) and self.structure == other.structure


def _describe(value: Any) -> Any:
    """A hashable description, equal for what computes the same."""
    if isinstance(value, dict):
        return tuple((key, _describe(value[key])) for key in sorted(value))
    if type(value) in (tuple, list):
        return (type(value).__name__, *map(_describe, value))
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        a = np.asarray(value)
        return (a.shape, str(a.dtype), a.tobytes())
    if hasattr(value, "eqns"):  # a jaxpr; its constants live as long as the cache holds them
        return (str(value), *map(id, getattr(value, "consts", ())))
    return value if _hashable(value) else repr(value)


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True
