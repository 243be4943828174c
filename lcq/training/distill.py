"""Finetuning without labels: a compressed net trained to give what the net gave before."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from lcq.forms.dtypes import native_tree
from lcq.training.finetune import check_batches, finetune
from lcq.training.given import Optimizer
from lcq.tree.aliases import Batch, Forms, Function, Params
from lcq.tree.paths import flatten


def distill(
    function: Function,
    params: Params,
    forms: Forms,
    tx: Optimizer,
    batches: Iterable[Batch],
    *,
    outputs: str = "logits",
    temperature: float = 1.0,
    steps: int | None = None,
    arrays: bool = True,
    fixed: Sequence[float] = (0.0,),
    on_step: Callable[[int, Array], None] | None = None,
) -> Forms:
    """Trains the numbers that forms hold, and the other arrays, to the outputs of the net before compression.

        minimise  mean over batches of  D(f(w, x), f(Delta(c; z), x))    over c and b, as in `finetune`

        "logits":  D(a, a') = T^2 sum_k p_k log(p_k / p'_k),    p = softmax(a / T), over the last axis
        "values":  D(a, a') = ||a - a'||^2 / ||a||^2,           over all outputs of a batch

    No label is needed: after `quantize`, the batches that it was given will do, better with what augmentation there is.
    As for `finetune`, codes, masks and ranks stay; scales, codebooks, norms and biases move.

    Args:
        function: (params, batch) -> an array, or for "values" a tree of arrays, of which whole numbers do not count.
            What is -inf in logits, such as classes that are left out, stays so and counts for nothing; neither do the
            positions that the function multiplies by a mask of zeros, such as padding. For a net with
            batch norm the function with running statistics; these are arrays and are tuned too where they are in
            `forms`.
        params: of the net before compression.
        forms: the same tree compressed, as from `lcq.quantize(...).forms`.
        tx: any optax optimizer, as for `finetune`.
        batches: inputs, all of the same shapes.
        outputs: what the outputs are: "logits" of classes along the last axis, such as those of tokens, or "values".
        temperature: T > 0, of "logits"; above 1 what is improbable counts for more.
        steps, arrays, fixed, on_step: as for `finetune`.

    Returns:
        The tree with stored forms that differ in these numbers alone.

    Raises:
        ValueError: T not above 0 or infinite, unknown `outputs`, `params` of another net, a function without such
            outputs, or what `finetune` refuses.

    Example:
        >>> import lcq, optax
        >>> f = lambda params, x: x @ params["kernel"]
        >>> params = {"kernel": jnp.array([[2., 0.], [1., 1.]])}
        >>> forms = lcq.compress(params, [lcq.Rule("kernel", lcq.Binary())])
        >>> x = jnp.array([[1., 0.], [0., 1.], [1., 1.]])
        >>> tuned = distill(f, params, forms, optax.sgd(0.1), [x] * 100, outputs="values")
        >>> lcq.decompress(tuned)["kernel"].round(1)
        Array([[1., 1.],
               [1., 1.]], dtype=float32)

    Source: Hinton, Vinyals & Dean, "Distilling the knowledge in a neural network", arXiv 1503.02531, section 2.
    """
    if outputs not in ("logits", "values"):
        raise ValueError(f'expected outputs="logits" or "values", got {outputs!r}')
    if not 0 < temperature < math.inf:
        raise ValueError(f"expected a finite temperature > 0, got {temperature}")
    check_batches(batches)
    before, after = (flatten(tree)[0] for tree in (params, forms))
    for path in before | after:
        had, has = (jnp.shape(leaves[path]) if path in leaves else None for leaves in (before, after))
        if had != has:
            raise ValueError(f"{path}: expected the net before compression, of shape {has} here, got {had} in params")
    teacher, params = jax.jit(function), native_tree(params)

    def checked(made: PyTree) -> PyTree:
        fits = [jnp.issubdtype(jnp.result_type(a), jnp.floating) for a in jax.tree.leaves(made)]
        if not any(fits) or (outputs == "logits" and not isinstance(made, jax.Array)):
            wanted = "one array of logits" if outputs == "logits" else "floating-point outputs"
            raise ValueError(
                f"expected {wanted} of the function, got {jax.tree.map(jax.typeof, made)}; return that alone"
                + ("" if outputs == "values" or not any(fits) else ', or say outputs="values"')
            )
        return made

    def taught() -> Iterator[tuple[Batch, PyTree]]:
        for batch in batches:
            yield batch, checked(teacher(params, native_tree(batch)))

    def loss(student: Params, pair: tuple[Batch, PyTree]) -> Float[Array, ""]:
        batch, wanted = pair
        if outputs == "logits":
            return divergence(wanted, function(student, batch), temperature)
        return relative_error(wanted, function(student, batch))

    return finetune(loss, forms, tx, taught(), steps=steps, arrays=arrays, fixed=fixed, on_step=on_step)


def divergence(
    wanted: Float[Array, "*n classes"], got: Float[Array, "*n classes"], temperature: float = 1.0
) -> Float[Array, ""]:
    """T^2 KL(softmax(wanted / T) || softmax(got / T)), the mean over all but the last axis, in float32; where p = 0,
    p log p/q = 0."""
    p, q = (jax.nn.log_softmax(a.astype(jnp.float32) / temperature) for a in (wanted, got))
    ratio = jnp.where(jnp.isneginf(p), 0, p) - jnp.where(jnp.isneginf(p), 0, q)
    return temperature**2 * (jnp.exp(p) * ratio).sum(-1).mean()


def relative_error(wanted: PyTree, got: PyTree) -> Float[Array, ""]:
    """||wanted - got||^2 / ||wanted||^2 over all floating-point arrays, in float32; the plain square where wanted is
    zero."""
    wanted, got = (
        [a for a in jax.tree.leaves(tree) if jnp.issubdtype(a.dtype, jnp.floating)] for tree in (wanted, got)
    )

    def square(tree: PyTree) -> Float[Array, ""]:
        return sum((jnp.sum(jnp.square(a.astype(jnp.float32))) for a in jax.tree.leaves(tree)), jnp.zeros(()))

    size = square(wanted)
    difference = jax.tree.map(lambda a, b: a.astype(jnp.float32) - b.astype(jnp.float32), wanted, got)
    return square(difference) / jnp.where(size > 0, size, 1.0)
