"""What is known of a product with a parameter: its operands as matrices, and which places of a leaf it reads."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Shaped

from lcq.forms.rotation import turned
from lcq.tracing import im2col
from lcq.tracing.equation import Content, Primitive
from lcq.tracing.jaxpr import IN_PLACE
from lcq.tracing.param_site import ParamSite, placed


class Operand(NamedTuple):
    """What a product multiplies with its weight, in one net and one batch.

    Attributes:
        x: The data.
        sizes: Rows of each expert, for a ragged product only.
        counts: Which rows of the result count, boolean, broadcasts against it; None for all.
    """

    x: Array
    sizes: Content = None
    counts: Content = None


@dataclasses.dataclass(frozen=True, eq=False)
class Product:
    """One product of data with a parameter, Y[g] = X[g] W[g] in the canonical layouts of `lcq.tracing.im2col`.

    A ragged one has a group for each expert, all of which share the rows of X; sizes say how many rows each has.

    Attributes:
        number: Position among the products of a trace.
        weight: The parameter, and the changes of layout on its way to the product.
        primitive: Name of the primitive: dot_general, conv_general_dilated or ragged_dot_general.
        params: Parameters of the primitive.
        side: Which operand the weight is.
        x: Shape and dtype of the other operand.
        w: Shape and dtype of the weight as the product has it.
        y: Shape and dtype of the result.
        source: File and line of the equation.
        lost: The equation behind which it is not known which positions count, so that all of them do; "" if it is
            known.
        seed: Of the rotation in which `inputs` are given, see `lcq.forms.rotation`; None as they are.
    """

    number: int
    weight: ParamSite
    primitive: Primitive
    params: dict[str, Content]
    side: int
    x: jax.ShapeDtypeStruct
    w: jax.ShapeDtypeStruct
    y: jax.ShapeDtypeStruct
    source: str
    lost: str = ""
    seed: int | None = None

    @property
    def path(self) -> str:
        return self.weight.path

    @property
    def kind(self) -> str:
        return {"dot_general": "dot", "conv_general_dilated": "conv"}.get(self.primitive.name, "ragged")

    @property
    def structure(self) -> tuple[object, ...]:
        """Equal for products whose methods do the same to arrays of equal shapes."""
        return self.primitive, self.params, self.side, len(self.x.shape), self.w.shape, self.seed

    @property
    def reading(self) -> tuple[object, ...]:
        """Equal for products that make the same matrices of equal operands, whatever their number of neurons."""
        if self.kind == "dot":
            return self.primitive, self._axes(1 - self.side), len(self.x.shape), self.seed
        if self.kind == "conv":
            window = [self.w.shape[axis] for axis in self.params["dimension_numbers"].rhs_spec[1:]]
            return self.primitive, self.params, len(self.x.shape), window, self.seed
        return self.structure

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(G, M, N, n)."""
        g, m, n_out = jax.eval_shape(self.outputs, self.y).shape
        if self.kind == "ragged":
            g *= self.w.shape[self._experts]
        return g, m, math.prod(self.w.shape) // (g * n_out), n_out

    @property
    def window(self) -> int:
        """Pixels of a convolution's window; 1 of a dot."""
        if self.kind != "conv":
            return 1
        return math.prod(self.w.shape[axis] for axis in self.params["dimension_numbers"].rhs_spec[2:])

    @property
    def flops(self) -> int:
        """2 G M N n; every row of a ragged product has one expert."""
        experts = self.w.shape[self._experts] if self.kind == "ragged" else 1
        return 2 * math.prod(self.shape) // experts

    def __call__(self, x: Array, w: Array, sizes: Array | None = None) -> Array:
        """The product, as the function makes it."""
        operands = (x, w) if self.side else (w, x)
        return self.primitive.bind(*operands, *(() if sizes is None else (sizes,)), **self.params)

    def inputs(self, x: Shaped[Array, "..."]) -> Shaped[Array, "G M N"]:
        """The data operand in its canonical layout; of a ragged product for all experts of a group together."""
        rows = self._inputs(x)
        return rows if self.seed is None else turned(rows, (-1,), self.seed)

    def _inputs(self, x: Shaped[Array, "..."]) -> Shaped[Array, "G M N"]:
        if self.kind != "conv":
            contract, batch = self._axes(1 - self.side)
            return im2col.flatten_axes(x, batch, self._free(1 - self.side), contract)
        spec = self.params["dimension_numbers"]
        return im2col.patches(
            x,
            spec.lhs_spec,
            window=[self.w.shape[axis] for axis in spec.rhs_spec[2:]],
            strides=self.params["window_strides"],
            padding=self.params["padding"],
            lhs_dilation=self.params["lhs_dilation"],
            rhs_dilation=self.params["rhs_dilation"],
            groups=self.params["feature_group_count"],
        )

    def parts(self, rows: int) -> int:
        """How many equal parts the images of a convolution can be cut into with at least so many rows each; else 1."""
        if self.kind != "conv":
            return 1
        images = self.x.shape[self.params["dimension_numbers"].lhs_spec[0]]
        most = max(1, self.shape[1] // rows)
        return next(k for k in range(min(most, images), 0, -1) if images % k == 0)

    def cut(self, x: Shaped[Array, "..."], parts: int) -> Shaped[Array, "parts ..."]:
        """The images of a convolution in equal parts."""
        axis = self.params["dimension_numbers"].lhs_spec[0]
        shape = (*x.shape[:axis], parts, x.shape[axis] // parts, *x.shape[axis + 1 :])
        return jnp.moveaxis(x.reshape(shape), axis, 0)

    def weights(self, w: Shaped[Any, "..."]) -> Shaped[Any, "G N n"]:
        """The weight operand in its canonical layout."""
        if self.kind != "conv":
            contract, batch = self._axes(self.side)
            experts = [self._experts] if self.kind == "ragged" else []
            return im2col.flatten_axes(w, [*batch, *experts], contract, self._free(self.side))
        spec = self.params["dimension_numbers"]
        return im2col.kernel_matrix(w, spec.rhs_spec, self.params["feature_group_count"])

    def places(self, shape: tuple[int, ...], depth: int = 0) -> np.ndarray:
        """Flat places of the weights [G, N, n] in leaf[index[:depth]], of a leaf of this shape."""
        return placed(self.weights(self.weight.inside(shape)), self.weight.start(shape, depth))

    def is_whole(self, shape: tuple[int, ...]) -> bool:
        """Whether its weights are all of leaf[index]: no change of layout of a followed leaf copies elements."""
        return math.prod(self.w.shape) == math.prod(shape[len(self.weight.index) :])

    def outputs(self, y: Shaped[Array, "..."]) -> Shaped[Array, "G M n"]:
        """The result in its canonical layout; of a ragged product as `inputs`."""
        if self.kind == "conv":
            return im2col.output_matrix(
                y, self.params["dimension_numbers"].out_spec, self.params["feature_group_count"]
            )
        batch, rows = len(self._axes(0)[1]), len(self._free(1 - self.side))
        columns = len(y.shape) - batch - rows
        first, second = (rows, columns) if self.side else (columns, rows)
        axes = range(batch), range(batch, batch + first), range(batch + first, batch + first + second)
        return im2col.flatten_axes(y, axes[0], *(axes[1:] if self.side else (axes[2], axes[1])))

    @property
    def contracted(self) -> tuple[int, ...]:
        """Axes of the data operand that are no rows."""
        if self.kind == "conv":
            return (self.params["dimension_numbers"].lhs_spec[1],)
        return self._axes(1 - self.side)[0]

    def counted(self, operand: Operand) -> Bool[Array, "G M"]:
        """Which rows of `inputs` count."""
        y = jax.eval_shape(self.__call__, operand.x, self.w, operand.sizes)
        return self.outputs(jnp.broadcast_to(operand.counts, y.shape)).any(-1)

    def members(self, operand: Operand) -> Bool[Array, "G M"]:
        """Which rows of a ragged product's inputs each expert has: the first are those of expert 0, then of 1, ..."""
        lengths = [operand.x.shape[axis] for axis in self._free(0)]
        groups = math.prod(operand.x.shape[axis] for axis in self._axes(0)[1])
        sizes = operand.sizes.reshape(-1, operand.sizes.shape[-1]).astype(jnp.int32)  # that sums fit
        sizes = jnp.broadcast_to(sizes, (groups, sizes.shape[1]))
        last = jnp.cumsum(sizes, 1).reshape(-1, 1)
        place = jax.lax.broadcasted_iota(last.dtype, lengths, 0).reshape(1, -1)
        return (place < last) & (place >= last - sizes.reshape(-1, 1))

    def spread(self, number: Shaped[Any, "G n"]) -> Shaped[Any, "..."]:
        """One number for each neuron, shaped to broadcast against the result."""
        if self.kind == "conv":
            shape = [1] * len(self.y.shape)
            shape[self.params["dimension_numbers"].out_spec[1]] = number.size
            return number.reshape(shape)
        batch = [self.w.shape[axis] for axis in self._axes(self.side)[1]]
        columns = [self.w.shape[axis] for axis in self._free(self.side)]
        rows = [1] * len(self._free(1 - self.side))
        return number.reshape([*batch, *(rows + columns if self.side else columns + rows)])

    def _axes(self, side: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        numbers = self.params.get("dimension_numbers")
        if numbers is None:
            numbers = self.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
        contract, batch = numbers
        return tuple(map(int, contract[side])), tuple(map(int, batch[side]))

    @property
    def _experts(self) -> int:
        """The axis of a ragged product's weight with a slice for each expert."""
        (axis,) = self.params["ragged_dot_dimension_numbers"].rhs_group_dimensions
        return int(axis)

    def _free(self, side: int) -> list[int]:
        contract, batch = self._axes(side)
        rank = len(self.w.shape if side == self.side else self.x.shape)
        experts = (self._experts,) if self.kind == "ragged" and side == self.side else ()
        return [axis for axis in range(rank) if axis not in (*contract, *batch, *experts)]


@dataclasses.dataclass(frozen=True)
class Unit:
    """Weights that are rounded together, and the products that use them.

    Attributes:
        product: The first use, which has their layout.
        shape: Of the leaf.
        uses: Numbers of the products that have these weights for the same inputs of the same groups: those whose inputs
            can be summed. The first is the first use.
        others: Numbers of the products that have the weights in another layout (a transpose), or together with other
            weights.
    """

    product: Product
    shape: tuple[int, ...]
    uses: tuple[int, ...]
    others: tuple[int, ...] = ()

    @property
    def path(self) -> str:
        """Path of the leaf in the tree."""
        return self.product.path

    @property
    def name(self) -> str:
        """The path, and which part of the leaf it is, see `region`."""
        index = self.product.weight.index
        if self.product.is_whole(self.shape):
            return self.path + "".join(f"[{i}]" for i in index)
        return self.path + region(self.product.places(self.shape), self.shape, len(index))

    def has_same_places(self, other: Product) -> bool:
        """Whether another product, perhaps of another trace, has the same weights in the same order."""
        mine, theirs = _straight(self.product), _straight(other)
        if mine is not None and theirs is not None:
            return mine == theirs
        return np.array_equal(self.product.places(self.shape), other.places(self.shape))

    def can_sum(self, other: Product) -> bool:
        """Whether another product of these weights has the same inputs of them, so that its own can be summed."""
        mine, theirs = _straight(self.product), _straight(other)
        if mine is not None and mine == theirs:
            return True
        one, two = (product.places(self.shape) for product in (self.product, other))
        return one.shape == two.shape and bool((np.sort(one, axis=2) == np.sort(two, axis=2)).all())


def _straight(product: Product) -> tuple[object, ...] | None:
    """The layout of a dot's weights that reach it as the leaf has them, and where they are; None of any other."""
    if product.kind != "dot" or any(step.primitive.name not in IN_PLACE for step in product.weight.steps):
        return None
    return product.weight.index, product.side, product.w.shape, product._axes(product.side)


def region(places: np.ndarray, shape: tuple[int, ...], lead: int = 0) -> str:
    """The part of a leaf that flat places make up, as an index; "" for the whole.

    Args:
        places: all different.
        shape: of the leaf.
        lead: how many of the first axes are named by a number in brackets of its own.

    Example:
        >>> places = np.arange(24).reshape(2, 3, 4)
        >>> region(places[1], (2, 3, 4), 1), region(places[:, 1], (2, 3, 4)), region(places[..., ::2], (2, 3, 4))
        ('[1]', '[:, 1]', '[:, :, 0:3:2]')
    """
    axes = [np.unique(index) for index in np.unravel_index(places.reshape(-1), shape)]
    if math.prod(map(len, axes)) != places.size:
        return f"[{int(places.min())} .. {int(places.max())}]"
    first = "".join(f"[{int(axis[0])}]" for axis in axes[:lead])
    rest = [_index(axis, length) for axis, length in zip(axes[lead:], shape[lead:], strict=True)]
    while rest and rest[-1] == ":":
        rest.pop()
    if all(part.isdigit() for part in rest):
        return first + "".join(f"[{part}]" for part in rest)
    return f"{first}[{', '.join(rest)}]"


def _index(places: np.ndarray, length: int) -> str:
    if len(places) == length:
        return ":"
    if len(places) == 1:
        return str(int(places[0]))
    steps = np.unique(np.diff(places))
    if len(steps) > 1:
        return "(" + ", ".join(map(str, map(int, places))) + ")"
    start, stop = int(places[0]), int(places[-1]) + 1
    step = int(steps[0])
    return f"{start}:{stop}:{step}" if step > 1 else f"{start}:{stop}"
