"""What is known of variables whose coordinates may be mixed, and the notes of which coordinates are told apart."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lcq.tracing import compact
from lcq.tracing.factors import Use, Value, fixed, left_out
from lcq.tracing.symbols import ANY, ONE, Symbols

Why = Callable[[], str]


@dataclasses.dataclass(eq=False)
class Mixed(Value):
    """What is known of a variable; `factors` are the coordinates of its elements, `ONE` for those that stay.

    Attributes:
        depends: On which axes it may depend.
        square: Whether it is a product of two that have the same coordinates.
    """

    depends: tuple[bool, ...] = ()
    square: bool = False


class Mixing:
    """Coordinates, uses of parameters, and notes on what is told apart."""

    def __init__(self) -> None:
        self.symbols = Symbols()
        self.uses: list[Use] = []
        self._notes: list[tuple[np.ndarray, np.ndarray]] = []

    def is_open(self, value: Mixed) -> bool:
        """Whether something of it could be mixed."""
        return value.places is not None or self.symbols.free(value.factors)

    def fresh(self, shape: tuple[int, ...], apart: Sequence[int] = ()) -> np.ndarray:
        """New coordinates, told apart along some axes."""
        made = self.symbols.fresh(shape)
        self.part(made)
        self.tell_apart(made, apart)
        return made

    def part(self, ids: np.ndarray) -> None:
        """These are a part of something: told apart from what is not in it."""
        self._notes.append((ids, np.zeros((1,) * ids.ndim, np.int64)))

    def tell_apart(self, ids: np.ndarray, axes: Sequence[int]) -> None:
        """Those with other indices along an axis are treated in another way."""
        for axis in axes:
            if ids.shape[axis] > 1:
                lengths = [-1 if i == axis else 1 for i in range(ids.ndim)]
                self._notes.append((ids, np.arange(ids.shape[axis]).reshape(lengths)))

    def end(self, value: Mixed, why: Why) -> None:
        """A parameter is used as it is."""
        if value.places is not None:
            one = fixed(value.rank)
            self.uses.append(Use(value.path, "other", value.places, one, one, value.pure, why()))
            value.places = None

    def pin(self, value: Mixed, why: Why) -> None:
        """It has to stay as it is."""
        if value.places is not None:
            one = fixed(value.rank)
            self.uses.append(Use(value.path, "other", value.places, one, one, value.pure, why()))
        self.symbols.pin(value.factors, why)

    def use(self, value: Mixed, role: str, above: np.ndarray, below: np.ndarray, why: Why) -> None:
        """Notes a use of a parameter; coordinates that it does not tell apart have to stay."""
        assert value.places is not None
        for ids in (above, below):
            if any(n > 1 and m == 1 for n, m in zip(ids.shape, value.places.shape, strict=True)):
                self.symbols.pin(ids, why)
        above, below = (np.where(self.symbols.roots(ids) == ONE, ONE, ids) for ids in (above, below))
        sides = [compact.shrunk(ids) if (ids == ONE).all() else ids for ids in (above, below)]
        self.uses.append(Use(value.path, role, value.places, sides[0], sides[1], value.pure, why()))

    def reconcile(self, sizes: dict[str, int], stay: Mapping[str, str]) -> None:
        """A leaf that is used several times is mixed in the same way, or not.

        Args:
            sizes: of the leaves.
            stay: why leaves have to stay as they are. So do those of which a part is used.
        """
        by_path: dict[str, list[Use]] = {}
        for use in self.uses:
            by_path.setdefault(use.path, []).append(use)
        several = {}
        for path, uses in by_path.items():
            if reason := stay.get(path) or left_out(path, uses, sizes[path]):
                for ids in (ids for use in uses for ids in (use.above, use.below)):
                    self.symbols.pin(ids, lambda: reason)
            count = np.zeros(sizes[path], np.int32)
            for use in uses:
                np.add.at(count, use.places.reshape(-1), 1)
            if count.max(initial=0) > 1:
                several[path] = uses
        before = -1
        while before != self.symbols.changes:  # what is fixed in one place may fix others
            before = self.symbols.changes
            for path, uses in several.items():
                named = ", ".join(dict.fromkeys(use.source for use in uses))
                self._join(uses, sizes[path], f"{path} is used at {named}")

    def _join(self, uses: Sequence[Use], size: int, why: str) -> None:
        known: dict[tuple[int, ...], np.ndarray] = {}
        covered: list[tuple[np.ndarray, set[tuple[int, ...]]]] = []
        for use in uses:
            mine = set()
            for ids in (use.above, use.below):
                if self.symbols.free(ids):
                    axes = tuple(axis for axis, n in enumerate(ids.shape) if n > 1)
                    lines = use.places.transpose([*axes, *(i for i in range(ids.ndim) if i not in axes)])
                    key = tuple(np.diff(lines.reshape(ids.size, -1)[:2, 0]).tolist())  # how far neighbours are apart
                    mine.add(key)
                    plane = known.setdefault(key, np.full(size, ANY, np.int64))
                    self.symbols.equal(compact.shrunk(plane[use.places]), ids, lambda: why)
                    plane[use.places] = ids
            covered.append((use.places, mine))
        for places, mine in covered:
            for key, plane in known.items():
                if key not in mine:
                    self.symbols.pin(plane[places], lambda: why)

    def signatures(self) -> tuple[np.ndarray, np.ndarray]:
        """A number for each coordinate, equal for those that are in the same notes with the same marks, and those that
        a note tells apart from themselves."""
        found = np.zeros(self.symbols.count, np.uint64)
        twice = []
        for number, (ids, marks) in enumerate(self._notes):
            roots, keys = (a.reshape(-1) for a in np.broadcast_arrays(self.symbols.roots(ids), marks))
            pairs = np.unique(roots[roots != ONE] * (1 << 24) + keys[roots != ONE])
            root, key = pairs >> 24, pairs & (1 << 24) - 1
            twice.append(root[1:][root[1:] == root[:-1]])
            np.add.at(found, root, _scattered((number << 24) + key))
        return found, np.unique(np.concatenate([np.zeros(0, np.int64), *twice]))


def _scattered(numbers: np.ndarray) -> np.ndarray:
    """64 bits that look random, so that sums of different sets of numbers differ (splitmix64, Steele et al. 2014)."""
    z = numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
