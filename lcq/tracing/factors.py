"""What is known of the variables of a function whose parameters are scaled: by what their elements are scaled then."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lcq.tracing import compact
from lcq.tracing.abstract_walk import whole_numbers
from lcq.tracing.equation import Content, Equation
from lcq.tracing.symbols import ANY, ONE, Symbols


class Use(NamedTuple):
    """Where a parameter is used: its elements at `places` are scaled by above / below.

    Attributes:
        path: Path of the leaf in the tree.
        role: "product", "gain", "bias", "lookup", or "other", where elements have to stay as they are.
        places: Flat places in the leaf.
        above: The factor of what comes out, broadcasts against places.
        below: The factor of what goes in, likewise.
        pure: Whether the elements are used as they are, not times something else.
        source: The equation, its file and line.
    """

    path: str
    role: str
    places: np.ndarray
    above: np.ndarray
    below: np.ndarray
    pure: bool
    source: str


@dataclasses.dataclass(eq=False)
class Value:
    """What is known of a variable.

    Attributes:
        shape: Of the variable.
        factors: By what its elements are scaled, compact, see `lcq.tracing.compact`.
        path: The leaf whose elements it has, while it is nothing but that, moved, and times what is no data.
        places: Of these in the leaf, compact.
        pure: Whether nothing was multiplied.
        data: Whether it follows from the batch.
        known: Its value, if it is a constant of whole numbers.
        infinite: Whether some of it may be infinite for all factors, which positive ones alone leave as it is.
    """

    shape: tuple[int, ...]
    factors: np.ndarray
    path: str = ""
    places: np.ndarray | None = None
    pure: bool = True
    data: bool = False
    known: np.ndarray | None = None
    infinite: bool = False

    @property
    def rank(self) -> int:
        return len(self.shape)

    def raised(self, rank: int) -> "Value":
        """A number as an array of as many axes as the others."""
        if self.rank == rank:
            return self
        lengths = (1,) * rank
        places = None if self.places is None else self.places.reshape(lengths)
        return dataclasses.replace(self, shape=lengths, factors=self.factors.reshape(lengths), places=places)

    def sliced(self, i: int) -> "Value":
        """Slice i along the first axis."""
        places = None if self.places is None else compact.taken(self.places, i)
        known = None if self.known is None else self.known[i]
        factors = compact.taken(self.factors, i)
        return dataclasses.replace(self, shape=self.shape[1:], factors=factors, places=places, known=known)


class Factors:
    """The unknown factors of variables, and the uses of parameters found so far."""

    def __init__(self) -> None:
        self.symbols = Symbols()
        self.uses: list[Use] = []

    def is_open(self, value: Value) -> bool:
        """Whether something of it could be scaled."""
        return value.places is not None or self.symbols.free(value.factors)

    def pin(self, value: Value, why: Callable[[], str]) -> None:
        """It has to stay as it is."""
        if value.places is not None:
            one = fixed(value.rank)
            self.uses.append(Use(value.path, "other", value.places, one, one, value.pure, why()))
        self.symbols.pin(value.factors, why)

    def use(self, value: Value, role: str, above: np.ndarray, below: np.ndarray, why: Callable[[], str]) -> None:
        """Notes a use of a parameter."""
        assert value.places is not None
        alone = tuple(i for i, n in enumerate(value.places.shape) if n == 1)
        above, below = (self.symbols.level(a, alone, why) for a in (above, below))
        self.uses.append(Use(value.path, role, value.places, above, below, value.pure, why()))

    def opened(self, value: Value, why: Callable[[], str], role: str = "bias") -> Value:
        """A parameter as any other value, each element with a factor of its own."""
        if value.places is None:
            return value
        made = self.symbols.fresh(value.places.shape)
        self.use(value, role, made, fixed(value.rank), why)
        return Value(value.shape, made, data=value.data)

    def level(self, value: Value, axes: Sequence[int], why: Callable[[], str]) -> np.ndarray:
        """The factors of a value, which have to be equal along these axes."""
        return self.symbols.level(value.factors, tuple(map(int, axes)), why)

    def reconcile(self, sizes: dict[str, int], stay: Mapping[str, str]) -> None:
        """Elements that are used several times have the same factors in all uses.

        Args:
            sizes: of the leaves.
            stay: why leaves have to stay as they are. So do those of which a part is used: what it would have to be
                scaled by is not known.
        """
        by_path: dict[str, list[int]] = {}
        for number, use in enumerate(self.uses):
            by_path.setdefault(use.path, []).append(number)
        for path, numbers in by_path.items():
            every = np.full((2, sizes[path]), ANY, np.int32)
            named = ", ".join(dict.fromkeys(self.uses[i].source for i in numbers))
            for i in numbers:
                for known, side in zip(every, ("above", "below"), strict=True):
                    self._join(known, self.uses[i].places, getattr(self.uses[i], side), f"{path} is used at {named}")
            for i in numbers:
                above, below = (compact.shrunk(known[self.uses[i].places]) for known in every)
                self.uses[i] = self.uses[i]._replace(above=above, below=below)
            if reason := stay.get(path) or left_out(path, [self.uses[i] for i in numbers], sizes[path]):
                self.symbols.pin(every, lambda: reason)

    def _join(self, known: np.ndarray, places: np.ndarray, new: np.ndarray, why: str) -> None:
        before = known[places]
        self.symbols.equal(compact.shrunk(before), new, lambda: why)
        after = known[places] = np.where(new == ANY, before, new)
        self.symbols.equal(known[places], after, lambda: why)  # an element that the use has twice


def left_out(path: str, uses: Iterable[Use], size: int) -> str:
    """What is to be said of a leaf of which a part is used; "" of others."""
    reached = np.zeros(size, bool)
    for use in uses:
        reached[use.places] = True
    if reached.all():
        return ""
    used = int(reached.sum())
    return (
        f"{path} is used in part, {used} of {size} elements; pass a batch that uses all, or leave the others out of it"
    )


def fixed(rank: int, number: int = ONE) -> np.ndarray:
    """The same factor for all elements, compact."""
    return np.full((1,) * rank, number)


def data(shape: tuple[int, ...]) -> Value:
    """A part of the batch."""
    return Value(shape, fixed(len(shape)), data=True)


def parameter(path: str, shape: tuple[int, ...], dtype: DTypeLike) -> Value:
    """A leaf."""
    value = Value(shape, fixed(len(shape)))
    if jnp.issubdtype(dtype, jnp.floating):
        value.path, value.places = path, np.arange(math.prod(shape), dtype=np.int32).reshape(shape)
    return value


def constant(content: Content) -> Value:
    """A constant: zeros can be scaled by anything, infinities by what is positive."""
    shape, dtype = np.shape(content), jnp.result_type(content)
    value = Value(shape, fixed(len(shape)), known=whole_numbers(content))
    if jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_):
        array = np.asarray(content)
        array = array.astype(np.float32) if jnp.issubdtype(dtype, jnp.floating) else array
        if ((array == 0) | ~np.isfinite(array)).all():
            value.factors = fixed(len(shape), ANY)
            value.infinite = bool((array != 0).any())
    return value


def spread(a: np.ndarray, onto: Sequence[int], rank: int) -> np.ndarray:
    """With its axes at these places among `rank`."""
    lengths = [1] * rank
    for axis, length in zip(onto, a.shape, strict=True):
        lengths[axis] = length
    return a.transpose(np.argsort(onto)).reshape(lengths)


def fills(eqn: Equation) -> bool:
    """Whether a lookup has something else than zeros or NaN in place of rows that there are not."""
    value = eqn.params["fill_value"]
    return value is not None and bool(value != 0) and bool(value == value)  # NaN is not equal to itself
