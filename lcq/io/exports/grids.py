"""Codes on a grid, as a matrix [outputs, inputs] with a scale for each group of inputs.

value[o, i] = scale[o, i // g] (code[o, i] - zero[o, i // g])
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Num, UInt

from lcq.forms import Codes
from lcq.forms.axes import letters
from lcq.io.exports.names import Name
from lcq.io.exports.steps import Steps, blocks_of, in_steps, steps_of


class Kind(NamedTuple):
    """What is known of a grid as a matrix before its codes are read.

    Attributes:
        outputs: rows of the matrix.
        inputs: columns.
        group: inputs that share a scale.
        steps: its levels.
    """

    outputs: int
    inputs: int
    group: int
    steps: Steps

    @property
    def words(self) -> str:
        """For reports."""
        return "by channel" if self.group == self.inputs else f"in groups of {self.group}"


class Grid(NamedTuple):
    """A grid with its codes.

    Attributes:
        codes: of each weight.
        scale: of each group, as the form has it.
        zero: of each group, in steps; None without zeros.
    """

    codes: UInt[np.ndarray, "outputs inputs"]
    scale: Float[np.ndarray, "outputs groups"]
    zero: Num[np.ndarray, "outputs groups"] | None


def kind_of(form: Codes, layout: str | None) -> Kind:
    """What a grid will be as a matrix; arrays may be shape structs.

    Raises:
        ValueError: no layout, or axes that make no matrix.
    """
    outputs, inputs = matrix_shape(form.shape, layout)
    return Kind(outputs, inputs, _group(form.shape, blocks_of(form), str(layout)), steps_of(form))


def grid_of(form: Codes, layout: str | None, kind: Kind, table: UInt[np.ndarray, " levels"], heads: int = 0) -> Grid:
    """A grid with the codes of another program.

    Args:
        form: in the working layout, in numpy.
        layout: of its axes.
        kind: as `kind_of` says.
        table: the other program's code for each of the form's.
        heads: as in `Name`.
    """
    codes = form.codes if (table == np.arange(table.size)).all() else table[form.codes]
    scale, zero = in_steps(form, kind.steps)
    order, groups = rotary_order(kind.outputs, heads), (kind.outputs, kind.inputs // kind.group)

    def each(numbers: np.ndarray) -> np.ndarray:
        return np.broadcast_to(per_row(numbers, form.shape, str(layout)), groups)[order]

    return Grid(as_matrix(codes, layout)[order], each(scale), None if zero is None else each(zero))


def matrix_shape(shape: Sequence[int], layout: str | None) -> tuple[int, int]:
    """Outputs and inputs of a leaf.

    Raises:
        ValueError: no layout, or one with a window.
    """
    if layout is None:
        raise ValueError(
            f"expected a name that says which axes of {list(shape)} are outputs and inputs, got none; say "
            "lcq.io.Name('PATTERN', 'TENSOR', layout='io'), or layout='oi'"
        )
    if len(shape) < 2:
        raise ValueError(f"expected codes of a matrix, got those of shape {list(shape)}; leave this leaf as it is")
    axes = letters(layout, len(shape))
    if set(axes) != {"o", "i"}:
        raise ValueError(
            f"expected a matrix, got axes {axes!r} of {list(shape)}; for layers or heads say lcq.io.Name('PATTERN', "
            "'TENSOR.{0}', layout='io', stacked=1), or layout='ioo', for experts of GGUF experts=1; windows of filters "
            "are no codes in other programs: leave this leaf out of the rules"
        )
    outputs, inputs = (math.prod(n for n, axis in zip(shape, axes, strict=True) if axis == which) for which in "oi")
    return outputs, inputs


def as_matrix(array: np.ndarray, layout: str | None) -> np.ndarray:
    """A leaf as a matrix [outputs, inputs]."""
    shape = matrix_shape(array.shape, layout)
    axes = letters(str(layout), array.ndim)
    return array.transpose([i for which in "oi" for i, axis in enumerate(axes) if axis == which]).reshape(shape)


def plain_shape(shape: Sequence[int], layout: str | None, heads: int = 0) -> tuple[int, ...]:
    """The shape of an array that is no codes: of a matrix, or with a window behind its outputs and inputs, as PyTorch
    has filters; a vector of outputs alone.

    Raises:
        ValueError: heads whose outputs the layout does not tell, or of filters.

    Example:
        >>> plain_shape((3, 3, 8, 16), "io"), plain_shape((8, 4, 2), "ioo"), plain_shape((5,), "io")
        ((16, 8, 3, 3), (8, 8), (5,))
    """
    if len(shape) < 2:
        return tuple(shape)
    axes = None if layout is None else letters(layout, len(shape))
    if heads and (axes is None or set(axes) - {"o", "i"}):
        raise ValueError(
            f"expected a name with heads= to say which axes of {list(shape)} are outputs, and which inputs, got "
            f"{'none' if axes is None else f'axes {axes!r}'}; say layout='ioo' of a kernel, layout='oo' of a bias, or "
            "drop heads="
        )
    if axes is None:
        return tuple(shape)
    if set(axes) == {"o"}:
        return (math.prod(shape),)
    order = _window_last(axes)
    return matrix_shape(shape, layout) if order is None else tuple(shape[i] for i in order)


def plain_array(array: np.ndarray, layout: str | None, heads: int) -> np.ndarray:
    """The same of its numbers; outputs of heads in rotary order."""
    if layout is not None and array.ndim > 1:
        axes = letters(layout, array.ndim)
        order = _window_last(axes)
        if order is not None:
            return array.transpose(order)
        array = as_matrix(array, layout) if "i" in axes else array.reshape(-1)
    elif array.ndim != 1:
        return array
    return array[rotary_order(len(array), heads)]


def plain_tensor_shape(shape: Sequence[int], rule: Name) -> tuple[int, ...]:
    """The shape of an array that is no codes, by its name; of experts in front."""
    many = rule.experts
    return (*shape[:many], *plain_shape(shape[many:], rule.layout, rule.heads))


def plain_tensor(array: np.ndarray, rule: Name) -> np.ndarray:
    """The same of its numbers."""
    lead, rest = array.shape[: rule.experts], array.shape[rule.experts :]
    if not lead:
        return plain_array(array, rule.layout, rule.heads)
    made = [plain_array(each, rule.layout, rule.heads) for each in array.reshape(-1, *rest)]
    return np.reshape(made, (*lead, *plain_shape(rest, rule.layout, rule.heads)))


def _window_last(axes: str) -> list[int] | None:
    """The order of axes with the window behind outputs and inputs; None without a window."""
    order = sorted(range(len(axes)), key=lambda i: "oi".find(axes[i]) % 3)
    return order if set(axes) - {"o", "i"} else None


def _group(shape: Sequence[int], counts: Sequence[int], layout: str) -> int:
    """Inputs that share a number: all, or neighbours along the last axis of inputs."""
    axes = letters(layout, len(shape))
    inputs = [(n, count) for n, count, axis in zip(shape, counts, axes, strict=True) if axis == "i"]
    if all(count == 1 for _, count in inputs):
        return math.prod(n for n, _ in inputs)
    length, count = inputs[-1]
    return length // count


def per_row(numbers: np.ndarray, shape: Sequence[int], layout: str) -> np.ndarray:
    """One number for each block of a leaf as one for each output, and each group of `_group` inputs."""
    axes, cut = letters(layout, len(shape)), _group(shape, numbers.shape, layout)
    inputs = math.prod(n for n, axis in zip(shape, axes, strict=True) if axis == "i")
    last = axes.rindex("i")
    for i, (length, axis) in enumerate(zip(shape, axes, strict=True)):
        if axis == "o" or (cut < inputs and i != last):
            numbers = np.repeat(numbers, length // numbers.shape[i], axis=i)
    return as_matrix(numbers, layout)


def rotary_order(outputs: int, heads: int) -> np.ndarray | slice:
    """Of outputs whose rotary pairs are halves of a head, which go where: pairs side by side.

    Raises:
        ValueError: heads that do not divide the outputs into pairs.

    Example:
        >>> rotary_order(8, 2).tolist()
        [0, 2, 1, 3, 4, 6, 5, 7]
    """
    if not heads:
        return slice(None)
    if outputs % (2 * heads):
        raise ValueError(f"expected outputs of {heads} heads of rotary pairs, got {outputs}; correct heads=")
    return np.arange(outputs).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)
