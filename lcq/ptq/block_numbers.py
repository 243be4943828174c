"""Which block each weight of a leaf is in, kept as coarse as the blocks are."""

import math

import numpy as np

from lcq.tracing.contraction import Product


class BlockNumbers:
    """Numbers of the blocks of a leaf, which its products say one after another.

    A slice is an array of numbers while it is filled, four bytes a weight; a full one keeps a number for each of the
    largest equal boxes in which numbers do not change.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape
        self._depth: int | None = None
        self._open: dict[tuple[int, ...], np.ndarray] = {}
        self._full: dict[tuple[int, ...], tuple[np.ndarray, tuple[int, ...]]] = {}

    def put(self, product: Product, numbers: np.ndarray) -> None:
        """Takes the numbers [G, N, n] of a product's weights, none of them below 0."""
        depth = len(product.weight.index)
        if self._depth is None:
            self._depth = depth
        if depth < self._depth:
            self._enlarge(depth)
        index = product.weight.index[: self._depth]
        here = self._open.pop(index, None)
        if here is None:
            here = np.full(self._shape[self._depth :], -1, np.int32)
        here.reshape(-1)[product.places(self._shape, self._depth)] = numbers
        if here.min() < 0:
            self._open[index] = here
        else:
            self._full[index] = _coarse(here)

    def equal_blocks(self, which: np.ndarray) -> np.ndarray:
        """The numbers of equal blocks along each axis, as large as they can be; what no product has taken is in 0.

        Args:
            which: blocks that count as one have the same number in it.
        """
        assert self._depth is not None
        self._full |= {index: _coarse(np.maximum(part, 0)) for index, part in self._open.items()}
        self._open = {}
        lengths = self._shape[self._depth :]
        periods = [math.gcd(*each) for each in zip(*(cut for _, cut in self._full.values()), strict=True)]
        counts = [n // p for n, p in zip(lengths, periods, strict=True)]
        numbers = np.zeros((*self._shape[: self._depth], *counts), np.int32)
        for index, (part, cut) in self._full.items():
            numbers[index] = which[_repeated(part, [a // b for a, b in zip(cut, periods, strict=True)])]
        return numbers[tuple(slice(None, None, period(axis, numbers)) for axis in range(numbers.ndim))]

    def _enlarge(self, depth: int) -> None:
        """Goes over to larger slices, leaf[index[:depth]]."""
        parts = [*self._open.items(), *((index, _repeated(*part)) for index, part in self._full.items())]
        self._open, self._full, self._depth = {}, {}, depth
        for index, part in parts:
            first = index[:depth]
            if first not in self._open:
                self._open[first] = np.full(self._shape[depth:], -1, np.int32)
            self._open[first][index[depth:]] = part


def period(axis: int, block: np.ndarray) -> int:
    """The greatest length into which an axis can be cut so that blocks do not change inside."""
    rows = np.moveaxis(block, axis, 0)
    changes = np.flatnonzero((rows[1:] != rows[:-1]).any(tuple(range(1, rows.ndim)))) + 1
    return math.gcd(len(rows), *map(int, changes))


def _coarse(numbers: np.ndarray) -> tuple[np.ndarray, tuple[int, ...]]:
    """A number for each box in which numbers do not change, and the lengths of these boxes."""
    cut = tuple(period(axis, numbers) for axis in range(numbers.ndim))
    return numbers[tuple(slice(None, None, n) for n in cut)].copy(), cut


def _repeated(numbers: np.ndarray, cut: list[int] | tuple[int, ...]) -> np.ndarray:
    """The inverse of `_coarse`."""
    for axis, n in enumerate(cut):
        numbers = numbers.repeat(n, axis)
    return numbers
