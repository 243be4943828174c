"""Quantization of a trained net without labels or retraining: one walk, and a rounding method at each product."""

import dataclasses
import re
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lcq.base import Form, Quantizer, is_form
from lcq.dtypes import native_tree, nearest_number
from lcq.methods.assembly import Assembly
from lcq.methods.descent import Descent
from lcq.methods.layerwise import Recursion, Rounded, everywhere, round_product
from lcq.methods.resolving import GPTQ, Qronos
from lcq.methods.rounding import GPFQ, SPFQ, Nearest, Rounding
from lcq.methods.walk import walk
from lcq.products import Product
from lcq.rules import Rule, Task, checked, flatten, resolve
from lcq.trace import trace
from lcq.tree import check_finite

METHODS: dict[str, Rounding] = {
    "nearest": Nearest(),
    "gpfq": GPFQ(),
    "spfq": SPFQ(),
    "gptq": GPTQ(),
    "qronos": Qronos(),
    "descent": Descent(),
}
"""By name, with their usual settings; `SparseGPFQ` has none."""


class Record(NamedTuple):
    """What was done at one product.

    Attributes:
        path: of the leaf; with indices where a leaf holds several layers.
        shape: (G, M, N, n) of one batch: groups, rows, inputs and neurons, see `lcq.unfold`.
        levels: of the codebook.
        method: such as GPFQ(order='natural').
        recursion: "blocked" on statistics, or "follow" on the inputs themselves.
        centred: whether a bias or a batch-norm mean took up the change of the mean.
        factor: median over neurons of the factor that the exact residual chose for the scale.
        scale: median of the scales, 1 for tables without one.
        dead: inputs that are always zero.
        error: ||Y - Y'||^2 / ||Y||^2 of the product's result in the original and in the quantized net, all before it
            quantized too.
        seconds: spent on it.
    """

    path: str
    shape: tuple[int, int, int, int]
    levels: int
    method: str
    recursion: str
    centred: bool
    factor: float
    scale: float
    dead: int
    error: float
    seconds: float


class Quantized(NamedTuple):
    """A quantized net.

    Attributes:
        forms: the parameters' tree, forms at the quantized leaves, biases and batch-norm means updated.
        records: one for each product that chose codes, in the order of the net.
    """

    forms: Any
    records: tuple[Record, ...]


def quantize(
    fn: Callable[[Any, Any], Any],
    params: Any,
    batches: Iterable[Any],
    rules: Sequence[Rule],
    method: str | Rounding = "gpfq",
    *,
    nearest: Sequence[Rule] = (),
    centred: bool = True,
    search: bool = True,
    recursion: Recursion = "auto",
    key: Array | None = None,
    host: bool = True,
    progress: Callable[[int, int, Record], None] | None = None,
) -> Quantized:
    """Quantizes the weights of every product of fn, each so that its results change least.

        min over q in the alphabet of ||X w - Y q||^2,  X a product's inputs in the original net, Y in the quantized one

    The function is traced once and walked once, with two values for each variable, the original and the quantized one;
    at the first product of each leaf (each layer of a stacked one) the method rounds its weights on the statistics
    H = Y'Y and D = Y'(X - Y) of all batches; later uses see the codes. The alphabet is the scheme's projection of
    the weights; its scale, per neuron where the scheme has that, is then the best of 17 by the exact residual, its own
    among them.

    Memory: two sets of live activations over all batches (in the host's memory on an accelerator, see `host`), H and D
    of one product, and one batch's inputs of it as a matrix (of a convolution, 4,096 rows at a time).

    Args:
        fn: (params, batch) -> anything; any function of jax arrays: linen's `apply`, nnx through `split` and `merge`.
        params: a tree of arrays; leaves that are forms already stay as they are.
        batches: unlabelled inputs of fn, of equal shapes, all kept until the end; may be sharded over a mesh.
        rules: schemes of the leaves: `Uniform`, `Levels` and its kin, or `KMeans`. per="channel" means a neuron of the
            product whatever the leaf's layout, and per=g groups of g of its inputs. Other schemes, such as `Cast`,
            are projected as `compress` does.
        method: "gpfq", "gptq", "qronos", "descent", "nearest", "spfq", or a `Rounding` with settings of your own.
        nearest: rules for leaves that are rounded before the walk and may be used in any way, such as an embedding.
        centred: whether biases and batch-norm means that are added to a product, and nothing else, absorb the change
            of its mean; weights are then rounded on centred statistics.
        search: whether to search the scale; else the scheme's own is kept.
        recursion: "blocked" on H and D, or "follow" the inputs themselves (GPFQ only); "auto" counts operations and
            bytes.
        key: a random key, for methods that draw.
        host: whether activations between products are kept in the host's memory.
        progress: called after each product with its number from 1, how many there are, and its record.

    Raises:
        ValueError: no batch, batches of different shapes, NaN activations, a leaf that cannot be followed to a product,
            or a rule that cannot be applied; names the leaf and the remedy.

    Example:
        >>> import lcq
        >>> def net(params, x):
        ...     return jax.nn.relu(x @ params["w1"]) @ params["w2"]
        >>> keys = jax.random.split(jax.random.key(0), 3)
        >>> params = {"w1": jax.random.normal(keys[0], (8, 16)), "w2": jax.random.normal(keys[1], (16, 4))}
        >>> batches = [jax.random.normal(keys[2], (64, 8))]
        >>> done = lcq.quantize(net, params, batches, [lcq.Rule("w.", lcq.Uniform(4, per="channel"))])
        >>> [record.path for record in done.records], done.forms["w2"].bits
        (['w1', 'w2'], 384)

    Source: Lybrand & Saab, arXiv 2010.15979; the walk, centring and the choice of scales are lcq's.
    """
    method, batches = _method(method), _checked(batches)
    leaves, structure = flatten(params)
    given = {path: leaf for path, leaf in leaves.items() if is_form(leaf)}
    original = {path: leaf.dense() if is_form(leaf) else leaf for path, leaf in leaves.items()}
    dense = jax.tree.unflatten(structure, original.values())
    chosen, direct = decide(rules, nearest, dense, given)
    result = {**original, **given}
    other = dict(original)
    for task in direct:
        for path, form in zip(task.paths, task.project(tuple(original[p] for p in task.paths)), strict=True):
            result[path], other[path] = form, form.dense()
    program = trace(fn, dense, batches[0], chosen)
    assemblies = {path: Assembly(original[path]) for path in chosen}
    updates: dict[str, np.ndarray] = {}
    records: list[Record] = []
    for visit in walk(program, original, other, batches, host=host):
        product, start = visit.product, time.perf_counter()
        if product.number not in program.first:
            visit.finish()
            continue
        shift = program.shifts.get(product.number) if centred else None
        if shift is not None and shift.path in given:
            shift = None
        rounded = round_product(
            product,
            product.weights(product.weight.moved(everywhere(original[product.path]))),
            visit.inputs,
            chosen[product.path],
            method,
            centred=shift is not None,
            search=search,
            recursion=recursion,
            key=None if key is None else jax.random.fold_in(key, product.number),
        )
        assembly = assemblies[product.path]
        assembly.put(product, rounded.form)
        other[product.path] = assembly.dense
        if shift is not None:
            update = updates.setdefault(shift.path, np.array(original[shift.path], np.float32, order="C"))
            update.reshape(-1)[shift.elements] += shift.sign * np.asarray(rounded.correction)
        error = visit.finish(rounded.correction)
        records.append(_record(product, method, rounded, error, time.perf_counter() - start))
        if progress is not None:
            progress(len(records), len(program.first), records[-1])
    result.update({path: assembly.form() for path, assembly in assemblies.items()})
    for path, update in updates.items():
        result[path] = _like(update, original[path])
    for task in direct:
        if any(path in updates for path in task.paths):
            result.update(zip(task.paths, task.project(tuple(result[p] for p in task.paths)), strict=True))
    return Quantized(jax.tree.unflatten(structure, result.values()), tuple(records))


def _method(method: str | Rounding) -> Rounding:
    if isinstance(method, str) and method in METHODS:
        return METHODS[method]
    if isinstance(method, Rounding):
        return method
    raise ValueError(f"wanted method one of {', '.join(METHODS)}, or a rounding such as lcq.GPFQ(); got {method!r}")


def _checked(batches: Iterable[Any]) -> list[Any]:
    """The batches, all of the same structure, shapes and dtypes."""
    if hasattr(batches, "shape"):
        raise ValueError(f"wanted an iterable of batches; got one array {list(batches.shape)}; pass [batch]")
    batches = [jax.tree.map(jnp.asarray, native_tree(batch)) for batch in batches]
    if not batches:
        raise ValueError("wanted at least one batch of inputs; got none")
    described = [jax.tree.map(jax.typeof, batch) for batch in batches]
    for i, other in enumerate(described):
        if jax.tree.flatten(other) != jax.tree.flatten(described[0]):
            raise ValueError(f"wanted batches of equal shapes; got {described[0]} and, batch {i}, {other}; drop it")
    if any(0 in np.shape(leaf) for leaf in jax.tree.leaves(batches[0])):
        raise ValueError(f"wanted batches with at least one example; got {described[0]}")
    return batches


def decide(
    rules: Sequence[Rule], nearest: Sequence[Rule], dense: Any, given: dict[str, Form]
) -> tuple[dict[str, Rule], list[Task]]:
    """The rule of each leaf that is rounded in the walk, and the tasks that are projected before it."""
    rules, nearest = checked(rules), checked(nearest)
    for rule in rules:
        per = getattr(rule.scheme, "per", None)
        if isinstance(per, tuple):
            raise ValueError(
                f"rule {rule.pattern!r}: wanted per=None, 'channel' or a group length, whose axes the product decides; "
                f"got per={per!r}"
            )
    kept = [Rule(re.escape(path), None) for path in given]
    direct = resolve([*kept, *nearest], dense) if nearest else ()
    taken = {path for task in direct for path in task.paths}
    whole = [dataclasses.replace(rule, scheme=_without_blocks(rule)) for rule in rules]
    tasks = resolve([*kept, *(Rule(re.escape(path), None) for path in taken), *whole], dense)
    chosen: dict[str, Rule] = {}
    before = list(direct)
    for task in tasks:
        if not isinstance(task.scheme, Quantizer):
            before.append(task)
            continue
        if len(task.paths) > 1:
            raise ValueError(f"{', '.join(task.paths)}: each product has an alphabet of its own; drop joint=True")
        chosen[task.name] = next(rule for rule in rules if re.fullmatch(rule.pattern, task.name))
        if chosen[task.name].stacked > 1:
            raise ValueError(f"{task.name}: wanted stacked=0 or 1; layers of a scan are independent without it")
    for path in (*chosen, *(path for task in before for path in task.paths)):
        check_finite(path, flatten(dense)[0][path])
    return chosen, before


def _without_blocks(rule: Rule) -> Any:
    """The scheme on the whole leaf: the blocks of `per` are the product's, not the leaf's."""
    if not isinstance(rule.scheme, Quantizer):
        return rule.scheme
    scheme: Any = rule.scheme  # a dataclass, as all schemes are
    return dataclasses.replace(scheme, per=None)


def _like(values: np.ndarray, leaf: Any) -> Array:
    return jax.device_put(nearest_number(values, leaf.dtype), leaf.sharding if isinstance(leaf, jax.Array) else None)


def _record(product: Product, method: Rounding, rounded: Rounded, error: float, seconds: float) -> Record:
    path = product.path + "".join(f"[{i}]" for i in product.weight.index)
    scale = 1.0 if rounded.form.scale is None else float(np.median(rounded.form.scale))
    centred = rounded.correction is not None
    return Record(
        path,
        product.shape,
        rounded.form.size_of_table,
        str(method),
        rounded.recursion,
        centred,
        rounded.factor,
        scale,
        rounded.dead,
        error,
        seconds,
    )
