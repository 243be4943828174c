"""Unknown factors by number: which of them are equal, and which are 1, and why."""

from collections.abc import Callable, Sequence

import numpy as np

ONE, ANY = 0, -1
"""The factor that is always 1, and that of a zero, which may be anything."""


class Symbols:
    """Unknowns other than 0, numbered from 1; `ONE` is known, and `ANY` stands for every number.

    Attributes:
        count: One more than the largest number.
        changes: How often something was said that was not known.

    Example:
        >>> symbols = Symbols()
        >>> a = symbols.fresh((3,))
        >>> symbols.equal(a[:1], a[1:2], lambda: "added")
        >>> symbols.pin(a[2:], lambda: "exp")
        >>> symbols.roots(a).tolist(), symbols.reason(3)
        ([1, 1, 0], 'exp')
    """

    def __init__(self) -> None:
        self._parent = np.zeros(1024, np.int64)
        self._pinned = np.zeros(1024, bool)
        self._signed = np.zeros(1024, bool)
        self._pinned[ONE] = True
        self.count = 1
        self.changes = 0
        self._reasons: dict[int, str] = {}

    def fresh(self, shape: tuple[int, ...]) -> np.ndarray:
        """New unknowns."""
        size = int(np.prod(shape, dtype=np.int64))
        made = np.arange(self.count, self.count + size)
        self.count += size
        if (more := 2 * self.count) > 2 * len(self._parent):
            grown = (np.pad(a, (0, more - len(a))) for a in (self._parent, self._pinned, self._signed))
            self._parent, self._pinned, self._signed = grown
        self._parent[made] = made
        return made.reshape(shape)

    def find(self, a: np.ndarray) -> np.ndarray:
        """The number that stands for all that are equal to each; `ANY` stays."""
        known = np.where(a == ANY, ONE, a)
        found = self._parent[known]
        while ((above := self._parent[found]) != found).any():
            found = above
        self._parent[known] = found
        return np.where(a == ANY, ANY, found)

    def roots(self, a: np.ndarray) -> np.ndarray:
        """As `find`, with `ONE` for those that have to be 1 and for `ANY`."""
        found = self.find(np.where(a == ANY, ONE, a))
        return np.where(self._pinned[found], ONE, found)

    def free(self, a: np.ndarray) -> bool:
        """Whether any of them is not yet known to be 1."""
        return bool((self.roots(a) != ONE).any())

    def reason(self, number: int) -> str:
        """Why this one has to be 1; "" if it does not."""
        return self.reasons([number])[0]

    def reasons(self, numbers: Sequence[int]) -> list[str]:
        """Why each of these has to be 1; "" if it does not."""
        return [self._reasons.get(root, "") for root in self.find(np.asarray(numbers, np.int64)).tolist()]

    def pin(self, a: np.ndarray, reason: Callable[[], str]) -> None:
        """All of them are 1."""
        new = np.unique(self.roots(a))
        new = new[new != ONE]
        if new.size:
            self._pinned[new] = True
            self.changes += 1
            self._reasons.update(dict.fromkeys(new.tolist(), reason()))

    def equal(self, a: np.ndarray, b: np.ndarray, reason: Callable[[], str]) -> None:
        """Each of a is the one of b in its place, as numpy broadcasts them; `ANY` says nothing."""
        if (a != ANY).all() and (b != ANY).all():  # what meets one number along an axis is all of that
            a, b = self.level(a, _alone(b), reason), self.level(b, _alone(a), reason)
        self._pair(a, b, reason)

    def _pair(self, a: np.ndarray, b: np.ndarray, reason: Callable[[], str]) -> None:
        one, two = np.broadcast_arrays(self.find(a), self.find(b))
        differ = (one != two) & (one != ANY) & (two != ANY)
        if not differ.any():
            return
        parent = self._parent
        pairs = np.unique(one[differ].astype(np.int64) * self.count + two[differ])
        for first, second in zip(*(each.tolist() for each in np.divmod(pairs, self.count)), strict=True):
            while (above := parent[first]) != first:
                first = int(above)
            while (above := parent[second]) != second:
                second = int(above)
            low, high = sorted((first, second))
            if low == high:
                continue
            if low == ONE:
                self.pin(np.asarray([high]), reason)
                continue
            if self._pinned[low] != self._pinned[high]:
                self._reasons.setdefault(low, self._reasons.get(high) or reason())
                self._pinned[low] = True
            self._signed[low] |= self._signed[high]
            self._parent[high] = low
            self.changes += 1

    def keep_sign(self, a: np.ndarray) -> None:
        """None of them may be negative."""
        self._signed[self.find(np.where(a == ANY, ONE, a))] = True

    def signed(self, a: np.ndarray) -> bool:
        """Whether any of them may not be negative."""
        return bool(self._signed[self.find(a)].any())

    def level(self, a: np.ndarray, axes: tuple[int, ...], reason: Callable[[], str]) -> np.ndarray:
        """All along these axes are equal; with one in place of all."""
        axes = tuple(axis for axis in axes if a.shape[axis] != 1)
        if not axes:
            return a
        if 0 in a.shape:  # of no elements
            return np.full([1 if axis in axes else n for axis, n in enumerate(a.shape)], ANY)
        one = a.max(axes, keepdims=True)  # `ANY` only where there is nothing else
        self._pair(a, one, reason)
        return one


def _alone(a: np.ndarray) -> tuple[int, ...]:
    return tuple(axis for axis, length in enumerate(a.shape) if length == 1)
