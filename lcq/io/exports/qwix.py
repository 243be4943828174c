"""Codes as qwix's arrays, {qvalue, scale, zero_point}, in the place of leaves.

    Delta = (qvalue - zero_point) scale,    qvalue int4 or int8, a scale for each group along any axis

No axis is moved: qwix's groups are those of lcq.
"""

import jax
import jax.numpy as jnp
import numpy as np

from lcq.forms import Cast, Codes, is_form
from lcq.forms.validate import named
from lcq.io.exports.leaves import refuse_what_has_no_target
from lcq.io.exports.steps import in_steps, offset_of, steps_of, whole_zeros
from lcq.io.exports.working import on_host
from lcq.io.tree_paths import flatten
from lcq.tree.aliases import Forms, Params


def to_qwix(forms: Forms) -> Params:
    """A tree with qwix's arrays for codes, as nested dicts {"array": {"qvalue", "scale", "zero_point"}}.

    That is how `qwix.quantize_params` lays out a tree, whose classes are put around it by
    `jax.tree.unflatten(jax.tree.structure(abstract_quantized_params), jax.tree.leaves(to_qwix(forms)))`.

    Args:
        forms: of linen's or nnx's parameters, codes of at most 8 bits on a grid.

    Returns:
        The tree; codes of up to 4 bits are int4, others int8. Zeros are in the same range as codes.

    Raises:
        ValueError: tables without a grid, masks, factors and sums, codes of more bits, or zeros that are not whole;
            names the leaf.

    Example:
        >>> import lcq
        >>> forms = lcq.compress({"kernel": jnp.array([[-2.0, 1.0]])}, [lcq.Rule(".*", lcq.Uniform(2))])
        >>> codes = to_qwix(forms)["kernel"]["array"]["qvalue"]
        >>> codes.dtype.name, codes.tolist()
        ('int4', [[-2, 1]])
    """
    leaves, structure = flatten(forms)
    refuse_what_has_no_target(leaves, lambda: iter(leaves), option=False)
    made = []
    for leaf in leaves:
        with named(leaf.path):
            value = leaf.value
            if isinstance(value, Codes):
                value = {"array": _array(on_host(value))}
            made.append(value.dense() if is_form(value) and isinstance(value, Cast) else value)
    return jax.tree.unflatten(structure, made)


def _array(form: Codes) -> dict[str, np.ndarray]:
    steps = steps_of(form)
    bits = 4 if steps.bits <= 4 else 8
    if steps.bits > 8:
        raise ValueError(f"expected codes of at most 8 bits, got {steps.bits}; compress with fewer")
    half, dtype = 1 << (bits - 1), np.dtype(jnp.int4) if bits == 4 else np.dtype(np.int8)
    whole = (np.asarray(steps.levels) + offset_of(steps, bits) - half).astype(np.int8)
    scale, zero = in_steps(form, steps)
    made = {"qvalue": whole[form.codes].astype(dtype), "scale": scale}
    if zero is not None:
        made["zero_point"] = (whole_zeros(zero, bits).astype(np.int16) - half).astype(dtype)
    return made
