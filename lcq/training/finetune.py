"""What is trained once the weights are compressed: the numbers in forms and the other leaves, codes fixed."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from lcq.forms import Codes
from lcq.forms.base import is_form
from lcq.forms.dtypes import native_tree, nearest_number, own_promotion
from lcq.training.given import Optimizer
from lcq.training.straight_through import straight_through
from lcq.tree.aliases import Batch, Forms, Function, Leaves, Params
from lcq.tree.paths import flatten


def finetune(
    loss: Function,
    forms: Forms,
    tx: Optimizer,
    batches: Iterable[Batch],
    *,
    steps: int | None = None,
    arrays: bool = True,
    fixed: Sequence[float] = (0.0,),
    on_step: Callable[[int, Array], None] | None = None,
) -> Forms:
    """Trains the numbers that forms hold; which weights share a number, are zero or of what rank stays as it is.

        minimise L(Delta(c; z), b)  over c and b

    c are the floating-point arrays of the forms: levels, scales, factors, surviving weights; z are their
    codes, masks, ranks, whole zeros and fixed tables; b are the arrays under no rule, such as biases. The gradient of a
    level is the sum over the weights that have it, so SGD wants a smaller rate than for weights; there are few numbers,
    so that `optax.lbfgs()` on one large batch does well. With batch norm, `lcq.recalibrate_batch_norm` afterwards.

    What a joint task shares is one number. Numbers in less than float32 are trained in float32 and rounded whenever
    the loss looks at them, so that what is tuned is what is returned; the gradient passes as if they were not.

    Args:
        loss: (params, batch) -> scalar, with Delta(Theta) in place of the forms.
        forms: a compressed tree, as from `lcq.extract`, `lcq.compress`, `lcq.quantize` or `lcq.load`.
        tx: any optax optimizer. It is given one flat dict of what is tuned: "dense0/bias" is that array and
            "dense0/kernel.levels" a part of that form, at its first leaf if leaves share it. `optax.partition` gives
            them different rates, or freezes some by `optax.set_to_zero()`, such as the biases.
        batches: training data, all of the same shapes.
        steps: updates to make, one batch each; by default as many as there are batches.
        arrays: whether arrays under no rule are tuned too.
        fixed: levels of these values stay, as those of `KMeans(fixed=...)`; a form does not say which were fixed. Zero
            by default, so that what is pruned stays pruned; () frees all.
        on_step: called after every update with its number, from 1, and the loss before it.

    Returns:
        The tree with stored forms that differ in these numbers alone; levels are put in order again, and codes follow.

    Raises:
        ValueError: no form, nothing to finetune, too few batches, or one in the place of several; leaves that share a
            number and differ in it; NaN or infinite numbers at the end.

    Example:
        >>> import lcq
        >>> forms = lcq.compress({"kernel": jnp.array([1., 3., 8., 8.])}, [lcq.Rule("kernel", lcq.KMeans(2))])
        >>> loss = lambda params, batch: jnp.sum((params["kernel"] - batch) ** 2)
        >>> tuned = finetune(loss, forms, optax.sgd(0.2), [jnp.array([0., 4., 5., 7.])] * 30)
        >>> lcq.decompress(tuned)["kernel"].round()
        Array([2., 2., 6., 6.], dtype=float32)

    Source: Han, Mao & Dally, arXiv 1510.00149, equation 3; straight-through rounding: arXiv 1308.3432.
    """
    if steps is not None and steps < 1:
        raise ValueError(f"expected steps >= 1, or None for all batches, got {steps}")
    check_batches(batches)
    net = _Net(forms, arrays, tuple(fixed))
    numbers = net.start()
    state = jax.tree.map(lambda a: jnp.array(a, copy=True), tx.init(numbers))  # some optimizers keep the parameters
    update = optax.with_extra_args_support(tx).update

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(numbers: dict[str, Array], state: PyTree, rest: PyTree, batch: Batch) -> tuple[PyTree, PyTree, Array]:
        def objective(numbers: dict[str, Array]) -> Array:
            return loss(net.dense(numbers, rest), batch)

        value, grads = jax.value_and_grad(objective)(numbers)
        updates, state = update(grads, state, numbers, value=value, grad=grads, value_fn=objective)
        return net.hold(optax.apply_updates(numbers, updates), numbers), state, value

    number = 0
    for number, batch in enumerate(batches if steps is None else itertools.islice(batches, steps), 1):
        numbers, state, value = step(numbers, state, net.rest, native_tree(batch))
        if on_step is not None:
            on_step(number, value)
    if number < (steps or 1):
        wanted = "at least one batch" if steps is None else f"{steps} batches"
        raise ValueError(f"expected {wanted}, got {number}; lower steps or pass more")
    return net.finish(numbers, number)


def check_batches(batches: object) -> None:
    """Refuses one batch in the place of several: its rows, or its names, would be taken for batches.

    Raises:
        ValueError: an array, or a dict of them.
    """
    if hasattr(batches, "shape") or isinstance(batches, Mapping):
        got = f"one array {list(batches.shape)}" if hasattr(batches, "shape") else "one dict"
        raise ValueError(f"expected an iterable of batches, got {got}; pass [batch] * steps")


@dataclasses.dataclass(frozen=True)
class _Slot:
    """Where a number that is tuned belongs; a leaf, as it is no pytree."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    def fill(self, numbers: dict[str, Array]) -> Array:
        return numbers[self.name].reshape(self.shape)


class _Net:
    """A compressed tree, taken apart into what is tuned and the rest.

    Attributes:
        given: what is tuned, by name, as it came.
        still: which entries of it do not move, by name; of codebooks with fixed levels.
        slots: for every array of the working forms its slot, or None.
        rest: for every array of the working forms the array, or None where there is a slot.
    """

    def __init__(self, tree: PyTree, arrays: bool, fixed: tuple[float, ...]) -> None:
        self.given: Leaves = {}
        self.still: dict[str, np.ndarray] = {}
        self._owners: dict[tuple[str, str], str] = {}
        self._fixed = np.asarray(fixed, np.float32)
        leaves, self._structure = flatten(tree)
        if not any(map(is_form, leaves.values())):
            raise ValueError(f"expected a tree with forms, got {len(leaves)} arrays; lcq.compress makes forms")
        working = []
        for path, leaf in leaves.items():
            if is_form(leaf):  # packed first, which trims what is outside of masks and ranks
                working.append(self._visit(path, "", leaf.pack().unpack()))
            else:
                working.append(self._slot(path, "", None, leaf) if arrays else leaf)
        if not self.given:
            raise ValueError("expected floating-point numbers to finetune, got forms of codes and fixed tables alone")
        flat, self._forms = jax.tree.flatten(working)
        self.slots = [a if isinstance(a, _Slot) else None for a in flat]
        self.rest = [None if isinstance(a, _Slot) else a for a in flat]

    def _visit(self, path: str, inside: str, node: PyTree) -> PyTree:
        """A form with slots in it; what leaves share is as in files: arrays of shared forms but their own."""
        if isinstance(node, tuple):
            return tuple(self._visit(path, f"{inside}.{i}", part) for i, part in enumerate(node))
        if not is_form(node):
            return self._slot(path, inside, None, node)
        changed = {}
        for field in dataclasses.fields(node):
            value, name = getattr(node, field.name), f"{inside}.{field.name}"
            if field.metadata.get("static") or value is None:
                continue
            if is_form(value) or isinstance(value, tuple):
                changed[field.name] = self._visit(path, name, value)
            else:
                shared = None if field.metadata.get("own") else node.shared
                changed[field.name] = self._slot(path, name, shared, value)
        return dataclasses.replace(node, **changed)

    def _slot(self, path: str, inside: str, shared: str | None, array: PyTree) -> PyTree:
        """The slot of a floating-point array, anything else as it is."""
        if not hasattr(array, "dtype") or not jnp.issubdtype(array.dtype, jnp.floating):
            return array
        name = path + inside if shared is None else self._owners.get((shared, inside), path + inside)
        if shared is None or (shared, inside) not in self._owners:
            while name in self.given:
                name += "'"
            self.given[name] = array
            if shared is not None:
                self._owners[shared, inside] = name
            if inside.endswith(".levels"):
                still = np.isin(np.asarray(array), self._fixed.astype(array.dtype))
                self.still |= {name: still} if still.any() else {}
        elif not np.array_equal(np.ravel(array), np.ravel(self.given[name])):
            raise ValueError(
                f"{path}: expected the {inside[1:]} of {name}, which it shares (shared={shared!r}), got another; "
                "compress both leaves in one joint task, or set shared=None"
            )
        return _Slot(name, array.shape, array.dtype)

    @own_promotion()
    def start(self) -> dict[str, Array]:
        """Fresh copies of what is tuned, in float32 or wider."""
        return {name: jnp.array(a, _wide(a.dtype), copy=True) for name, a in self.given.items()}

    @own_promotion()
    def hold(self, numbers: dict[str, Array], there: dict[str, Array]) -> dict[str, Array]:
        """`numbers`, but `there` where they do not move."""
        return numbers | {name: jnp.where(still, there[name], numbers[name]) for name, still in self.still.items()}

    @own_promotion()
    def _put(self, numbers: dict[str, Array], rest: Sequence[PyTree], rounded: bool) -> list[PyTree]:
        """Working forms and arrays with these numbers, in float32 or as they are stored."""
        flat = []
        for slot, other in zip(self.slots, rest, strict=True):
            if slot is None:
                flat.append(other)
            else:
                flat.append(nearest_number(slot.fill(numbers), slot.dtype) if rounded else slot.fill(numbers))
        made: list[PyTree] = jax.tree.unflatten(self._forms, flat)
        return [_in_steps(leaf) for leaf in made] if rounded else made

    def dense(self, numbers: dict[str, Array], rest: Sequence[PyTree]) -> Params:
        """The parameters as they will be stored, differentiable as if numbers were not rounded."""
        numbers = self.hold(numbers, jax.lax.stop_gradient(numbers))
        pairs = zip(self._put(numbers, rest, False), self._put(numbers, rest, True), strict=True)
        leaves = [straight_through(w.dense(), r.dense()) if is_form(r) else r for w, r in pairs]
        return jax.tree.unflatten(self._structure, leaves)

    @own_promotion()
    def finish(self, numbers: dict[str, Array], steps: int) -> Forms:
        """The tree with stored forms."""
        bad = [name for name, a in numbers.items() if not bool(jnp.isfinite(a).all())]
        if bad:
            raise ValueError(
                f"{', '.join(bad)}: expected finite numbers, got NaN or infinite ones after {steps} updates: "
                "the run diverged; use a smaller learning rate"
            )
        leaves = self._put(numbers, self.rest, True)
        return jax.tree.unflatten(self._structure, [_ascending(a).pack() if is_form(a) else a for a in leaves])


def _wide(dtype: DTypeLike) -> DTypeLike:
    """float32 or wider; floats of 8 bits, which numpy and jax do not promote, included."""
    return dtype if jnp.dtype(dtype).itemsize > 4 else jnp.float32


def _in_steps(node: PyTree) -> PyTree:
    """A working form with the scales in it that it stores in steps rounded to these."""
    if isinstance(node, tuple):
        return tuple(map(_in_steps, node))
    if not is_form(node):
        return node
    if isinstance(node, Codes):
        return node.in_steps()
    fields = [f.name for f in dataclasses.fields(node) if not f.metadata.get("static")]
    return dataclasses.replace(node, **{name: _in_steps(getattr(node, name)) for name in fields})


def _ascending(node: PyTree) -> PyTree:
    """A working form with the levels in it in ascending order, and codes that follow; it has the same `dense()`."""
    if isinstance(node, tuple):
        return tuple(map(_ascending, node))
    if not is_form(node):
        return node
    fields = {f.name: f.metadata for f in dataclasses.fields(node) if not f.metadata.get("static")}
    changed = {name: _ascending(getattr(node, name)) for name in fields}
    if (levels := changed.get("levels")) is not None:
        order = jnp.argsort(levels, axis=-1)
        place = jnp.argsort(order, axis=-1).astype(jnp.float32)
        changed["levels"] = jnp.take_along_axis(levels, order, axis=-1)
        for name, metadata in fields.items():
            if metadata.get("leafwise") and jnp.issubdtype(changed[name].dtype, jnp.integer):
                changed[name] = Codes(changed[name], levels=place).dense().astype(changed[name].dtype)
    return dataclasses.replace(node, **changed)
