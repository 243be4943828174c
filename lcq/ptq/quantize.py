"""Quantization of a trained net without labels or retraining: one walk, and a rounding method at each product."""

import dataclasses
import os
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lcq.forms.base import is_form
from lcq.forms.dtypes import nearest_number
from lcq.forms.processes import shared_by_processes
from lcq.forms.rotation import turned
from lcq.ptq.batches import Mask, checked_batches, traced
from lcq.ptq.gathering import LastMoments, everywhere
from lcq.ptq.layer import Rounded, round_product
from lcq.ptq.leaf_assembly import Assembly, placed
from lcq.ptq.resume import Saved, description
from lcq.ptq.rounding import ROUNDING_METHODS, Rounding
from lcq.ptq.rounding.coded import level_count
from lcq.ptq.tasks import check_paths, decide, method_at, warn_of_direct
from lcq.ptq.transforms.base import Transform, TransformRecord
from lcq.ptq.two_stream import Outcome, Use, Visit, walk
from lcq.tracing.biases import BiasSite
from lcq.tracing.contraction import Product
from lcq.tracing.program import Program
from lcq.tree.aliases import Batch, Forms, Function, Params
from lcq.tree.compress import check_finite, take
from lcq.tree.lazy import is_lazy, shape_of, whole
from lcq.tree.paths import check_numbers, flatten
from lcq.tree.rules import Rules, checked


class Record(NamedTuple):
    """What was done at one product.

    Attributes:
        path: Path of the leaf in the tree; with indices where a leaf holds several layers or kernels, such as w[2] or
            qkv[:, 0:64].
        shape: Shape (G, M, N, n) of the product for one batch: groups, rows, inputs and neurons, see
            `lcq.tracing.im2col`.
        levels: Number of levels of the codebook; of a trellis 2^bits, from which each code chooses.
        method: The rounding method with those of its settings that are not as usual, such as GPFQ(act_order=True); of a
            trellis the one that stands for it.
        recursion: "blocked" on statistics, or "follow" on the inputs themselves.
        bias_correction: Whether a bias or a batch-norm mean took up the change of the mean.
        factor: Median over neurons of the size of the factor that the exact residual chose for the scale.
        scale: Median of the sizes of the scales; 1 for codebooks without one.
        dead: Number of inputs that are always zero.
        error: Relative error ||Y - Y'||^2 / ||Y||^2 of the product's result, Y in the original net and Y' in the
            quantized one, all before it quantized too.
        seconds: Seconds spent on the product.
        uses: Number of products of these weights whose inputs were summed: steps of a recurrent cell, branches, tied
            layers.
        others: Number of products that use the weights in another layout (a transpose): they see the codes, and have no
            influence on them.
        rows: Number of rows of the inputs that counted, over all batches and uses; of the expert with the most.
        lost: The equation behind which it was not known which positions count, so that all did; "" if it was known.
        silent: Groups without data, whose scales are the scheme's own: experts that saw no token, channels that are
            always zero, or do not vary where a bias takes their mean.
        shrink: Share by which the products of two different inputs were shrunk, given how few rows there were; the
            median over groups, see `lcq.ptq.shrinkage`.
        damping: Largest damping of H by the method, in units of the mean of its diagonal; more than its setting where
            that left no root; 0 for methods without one.
        held_out: Relative error ||X w - Y q||^2 / ||X w||^2 on held-out rows: of codes from three quarters of the rows,
            with the scheme's scales, on the last quarter, in turns; of large layers on 64 of the neurons. None if
            `shrink` was given, or there was one row alone.
    """

    path: str
    shape: tuple[int, int, int, int]
    levels: int
    method: str
    recursion: str
    bias_correction: bool
    factor: float
    scale: float
    dead: int
    error: float
    seconds: float
    uses: int = 1
    others: int = 0
    rows: int = 0
    lost: str = ""
    silent: tuple[int, ...] = ()
    shrink: float = 0.0
    damping: float = 0.0
    held_out: float | None = None


class Quantized(NamedTuple):
    """A quantized net.

    Attributes:
        forms: The parameters' tree with forms at the quantized leaves, biases and batch-norm means updated.
        records: One record for each product that chose codes, in the order of the net.
        transforms: Those of the transforms, one after another.
    """

    forms: Forms
    records: tuple[Record, ...]
    transforms: tuple[TransformRecord, ...] = ()


def quantize(
    fn: Function,
    params: Params,
    calibration: Iterable[Batch],
    rules: Rules,
    method: str | Rounding = "descent",
    *,
    rtn: Rules = (),
    transforms: Sequence[Transform] = (),
    mask: Mask = None,
    bias_correction: bool = True,
    offload: bool = True,
    resume: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int, Record], None] | None = None,
) -> Quantized:
    """Quantizes the weights of every product of fn, each so that its results change least.

        min over q in the codebook of ||X w - Y q||^2,  X a product's inputs in the original net, Y in the quantized one

    The function is traced once and walked once, with two values for each variable, the original and the quantized one;
    for each leaf (each layer of a stacked one, each slice of a fused one) the method rounds its weights on the
    statistics H = Y'Y and D = Y'(X - Y) of all batches and all uses. The codebook is the scheme's projection of
    the weights; its scale, per neuron where the scheme has that, is then the best of 17 by the exact residual, its own
    unless another is better beyond rounding errors; of 26, for codebooks that are not symmetric, where the mirrored one
    is tried too. Of layers with more than 64 neurons and at least 256 inputs a sample of neurons says first which are
    worth a try on all, see `lcq.ptq.scale_search`: the errors are within a hundredth.

    Few rows say little of how inputs vary together, and codes that fit them are wrong for new data: with 32 rows for
    128 inputs much worse than `lcq.compress`. So what H and D have between two inputs is shrunk; by how much is chosen
    on rows held back, a quarter at a time, two to four times, for each product and method; nothing where rows suffice.

    Uses: weights with several uses (a recurrent cell's steps, siamese branches, tied layers) are rounded once, on the
    sums over all of them. Where a use depends on an earlier one, X is from the original net as ever, and Y from the net
    in which all weights are quantized whose first use came before these weights' first, while these and later ones are
    not yet; then that stretch of the net is run again with their codes, for later weights, and for the errors. A use in
    another layout (a transpose) sees the codes and has no say. A `ragged_dot` is a product for each expert; one without
    rows keeps its scale and gets the nearest codes.

    Memory: two sets of live activations over all batches (in the host's memory on an accelerator, see `offload`), H and
    D of one product five times (of more than 2,048 inputs three times), and one batch's inputs of it as a matrix (of a
    convolution, 4,096 rows at a time).

    Args:
        fn: (params, batch) -> anything; any function of jax arrays: linen's `apply`, nnx through `split` and `merge`.
            Its second argument is a whole batch, as `calibration` has it: of tuples (x, y) pass
            lambda params, batch: fn(params, *batch).
        params: a tree of arrays; leaves that are forms already stay as they are.
        calibration: batches of unlabelled inputs of fn, all kept until the end; may be sharded over a mesh. Of any
            shapes: a trace and a compilation for each.
        rules: schemes of the leaves: `Uniform`, `Levels` and its kin, `KMeans`, or `Trellis`. per="channel" means a
            neuron of the product whatever the leaf's layout, and per=g groups of g of its inputs; paths run along its
            inputs. `Rotated` of one of these rounds in turned coordinates, on the statistics of turned inputs. Other
            schemes are projected on the weights alone, before the walk, as `compress` does: with a warning, but for
            `Cast`.
        method: "descent", best on most nets that were measured, from Qronos's codes; "qronos", "gptq", "gpfq" as its
            paper has it, "rtn" (round to nearest); or a `Rounding` with settings of your own, such as SPFQ(seed=0) or
            GPTQ(damping=0.1, shrink=0), see `lcq.ptq.Rounding` for those that all have. A `Trellis` is rounded by
            `lcq.ptq.BlockLDL`, for which "descent", "qronos" and "gptq" stand, or to the nearest paths by "rtn"; others
            refuse it.
        rtn: rules for leaves that are rounded before the walk and may be used in any way, such as an embedding.
        transforms: what changes the parameters before the walk and leaves fn as it is, one after another, such as
            [lcq.ptq.transforms.equalize]: weights that lose less, see `lcq.ptq.transforms`. They get `rules` with what
            `rtn` takes left out, and `mask`; leaves that are read when they are asked for are then read whole.
        mask: which positions of a batch count; None for all. Either a function of the batch that gives a boolean array
            (or 0 and 1) of the leading axes of its leaves, such as lambda tokens: tokens != 0, or a tree with such an
            array or None for every leaf; or the path of the leaf that is that array, such as "attention_mask". It is
            followed through fn, see `lcq.tracing.positions`; positions that do not count are left out of all
            statistics, of means and of errors. Where it cannot be followed a warning names leaf and equation, and
            `Record.lost` keeps it; then all rows count.
        bias_correction: whether biases and batch-norm means that are added to a product, and nothing else, absorb the
            change of its mean; weights are then rounded on centred statistics. Kernels and biases may be concatenated,
            as in flax's OptimizedLSTMCell. One that is used in several steps stays as it is.
        offload: whether activations between products are kept in the host's memory; those that are spread over a mesh
            stay on it.
        resume: a folder for what has been rounded so far, made if it is not there. A run that was killed and is called
            again goes on and gives the same bytes; the products before are made again, which rounds nothing. May be
            removed afterwards.
        progress: called with each record, its number from 1 and how many there are; for weights whose uses depend on
            each other when the last of them are rounded.

    Raises:
        ValueError: no batch, batches of different structure, a leaf or a part of a batch that is no array, a mask that
            fits none, NaN activations, a leaf that cannot be followed to a product, statistics that the method
            cannot factorise, a rule that cannot be applied, or a folder to resume from that is of another run; names
            the leaf and the remedy.

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
    method, batches = _method(method), checked_batches(calibration)
    transformed: list[TransformRecord] = []
    for transform in transforms:
        left_out = [dataclasses.replace(rule, scheme=None) for rule in checked(rtn)]
        params, told = transform(fn, params, batches, [*left_out, *checked(rules)], mask)
        transformed += told
    leaves, structure = flatten(params)
    check_numbers(leaves)
    for path, leaf in leaves.items():
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise ValueError(f"{path}: expected an array, whose values are rounded, got {leaf}; pass the parameters")
        _check_readable(path, leaf)
    _check_readable("calibration", batches)
    given = {path: leaf for path, leaf in leaves.items() if is_form(leaf)}
    original = {path: leaf.dense() if is_form(leaf) else leaf for path, leaf in leaves.items()}
    dense = jax.tree.unflatten(structure, map(shape_of, original.values()))
    chosen, seeds, direct = decide(rules, rtn, dense, given)
    warn_of_direct(direct, rtn)
    methods = {path: method_at(path, method, rule) for path, rule in chosen.items()}
    for path in (*chosen, *(path for task in direct for path in task.paths)):
        if is_lazy(original[path]):
            check_finite(path, original[path])
    result = {**original, **given}
    other = dict(original)
    for task in direct:
        for path, form in zip(task.paths, task.project(take(original, task)), strict=True):
            result[path], other[path] = form, form.dense()
    programs, inputs = traced(fn, dense, batches, chosen, mask)
    _warn_of_lost(programs)
    check_paths(programs[0], chosen, seeds, dense)
    assemblies = {path: Assembly(original[path], seeds.get(path)) for path in chosen}
    updates: dict[str, np.ndarray] = {}
    records: list[Record] = []
    waiting: list[tuple[Record, Outcome]] = []
    last = LastMoments()
    saved = None
    if resume is not None:
        settings = {"rules": rules, "rtn": rtn, "method": method, "bias_correction": bias_correction}
        saved = Saved(resume, description(programs, leaves, inputs, settings))

    def tell() -> None:
        while waiting and waiting[0][1].error is not None:
            record, outcome = waiting.pop(0)
            records.append(record._replace(error=outcome.error or 0.0))
            if progress is not None:
                progress(len(records), len(programs[0].units), records[-1])

    for visit in walk(programs, original, other, inputs, offload=offload):
        unit, product, start = visit.unit, visit.product, time.perf_counter()
        if unit is None:
            visit.finish()
            continue
        shift = _bias_site(visit.uses, programs) if bias_correction else None
        if shift is not None and any(part.path in given for part in shift.parts):
            shift = None
        number = len(records) + len(waiting)
        before = saved.get(number, unit.name) if saved else None
        if before:
            rounded, _ = before
        else:
            last.wanted = visit.is_followed
            seed = seeds.get(product.path)
            rounded = round_product(
                [use._replace(product=dataclasses.replace(use.product, seed=seed)) for use in visit.uses],
                _weights(product, original[product.path], seed),
                chosen[product.path],
                methods[product.path],
                centred=shift is not None,
                last=last,
            )
        assembly = assemblies[product.path]
        assembly.put(product, rounded.form)
        other[product.path] = assembly
        sign, parts = shift or (0, ())
        for part in parts:
            if part.path not in updates:
                updates[part.path] = np.array(whole(original[part.path]), np.float32, order="C")
            change = np.asarray(rounded.correction).reshape(-1)[part.neurons]
            updates[part.path].reshape(-1)[part.elements] += sign * change
        record = _record(visit, methods[product.path], rounded)
        outcome = visit.finish(rounded.correction)
        if not unit.others and len(unit.uses) == 1:
            assembly.forget(product)
        seconds = before[1] if before else time.perf_counter() - start
        if saved and not before:
            saved.put(number, unit.name, rounded, seconds)
        waiting.append((record._replace(seconds=seconds), outcome))
        del visit
        tell()
    tell()
    result.update({path: assembly.form() for path, assembly in assemblies.items()})
    for path, update in updates.items():
        result[path] = _like(update, original[path])
    for task in direct:
        if any(path in updates for path in task.paths):
            result.update(zip(task.paths, task.project(take(result, task)), strict=True))
    return Quantized(jax.tree.unflatten(structure, map(whole, result.values())), tuple(records), tuple(transformed))


def _weights(product: Product, leaf: Any, seed: int | None) -> Any:
    """The weights [G, N, n] of a product, turned if there is a seed; on the host unless spread over devices."""
    spread = isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1
    w = product.weights(product.weight.moved(everywhere(leaf)) if spread else product.weight.moved_on_host(leaf))
    if seed is None:
        return w
    w = turned(jnp.asarray(w), (-2,), seed)
    return w if spread else np.asarray(w)


def _check_readable(path: str, tree: Any) -> None:
    if shared_by_processes(tree):
        raise ValueError(
            f"{path}: expected arrays that this process can read, got one on the devices of several processes; "
            "quantize on the devices of one process each, the same in all: replicate it first, by "
            "jax.experimental.multihost_utils.process_allgather(array, tiled=True)"
        )


def _method(method: str | Rounding) -> Rounding:
    return method if isinstance(method, Rounding) else ROUNDING_METHODS[method]()


def _like(values: np.ndarray, leaf: Any) -> Array:
    return placed(nearest_number(values, leaf.dtype), leaf)


def _bias_site(uses: Sequence[Use], programs: Sequence[Program]) -> BiasSite | None:
    """What takes up the change of the mean: a bias of weights with one use, the same in all traces."""
    found = [programs[use.batches[0]].bias_sites.get(use.product.number) for use in uses]
    first = found[0]
    if len(found) != len(set(programs)) or first is None:
        return None
    return first if all(first.is_same(other) for other in found) else None


def _warn_of_lost(programs: Sequence[Program]) -> None:
    """Says once for each leaf where it is not known any more which positions count."""
    lost = {product.path: product.lost for program in programs for product in program.products if product.lost}
    for path, where in lost.items():
        warnings.warn(
            f"{path}: expected to follow mask= to its inputs, got lost at {where}, so all of their rows count; "
            "move that out of the function, or exclude the leaf",
            stacklevel=3,
        )


def _record(visit: Visit, method: Rounding, rounded: Rounded) -> Record:
    """Without the error, which may not be known yet, and the time."""
    assert visit.unit is not None
    product = visit.product
    return Record(
        visit.unit.name,
        product.shape,
        level_count(rounded.form),
        str(method),
        rounded.recursion,
        rounded.correction is not None,
        rounded.factor,
        1.0 if rounded.form.scale is None else float(np.median(np.abs(rounded.form.scale))),
        rounded.dead,
        np.nan,
        0.0,
        len(visit.unit.uses),
        len(visit.unit.others),
        rounded.rows,
        next((use.product.lost for use in visit.uses if use.product.lost), ""),
        rounded.silent,
        rounded.shrink,
        rounded.damping,
        rounded.held_out,
    )
