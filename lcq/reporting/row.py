"""A line of a table: what one leaf costs, or several together."""

import math
from typing import NamedTuple


class Row(NamedTuple):
    """One leaf, or a sum of leaves.

    Attributes:
        path: of the leaf.
        shape: of the leaf; () in sums.
        form: what is stored, in words.
        dense: bits of the leaf as it was, in its own dtype: what every ratio compares with.
        bits: bits of what is stored, codes at a fixed width; what joint leaves share counts at the first of them.
        error: ||w - Delta(Theta)||^2, if there was a reference.
        energy: ||w||^2 likewise.
        rule: the pattern that decides, in a dry run.
        scheme: what it asks for.
        entropy: `bits` with codes at their entropy, None where there are no concrete arrays.
        coded: bits that an entropy-coded file takes for it, names and digests aside; None likewise.
        blocks: along which axes it has scales, codebooks or groups of their own, such as "axis 3", or "32 of axis 0,
            axis 1" for one for each 32; "" for one in all.
        dtype: of the leaf as it was; of several leaves, all there are.
        compressed: whether a form is stored; in a sum, of any leaf.
    """

    path: str
    shape: tuple[int, ...]
    form: str
    dense: int
    bits: int
    error: float | None = None
    energy: float | None = None
    rule: str | None = None
    scheme: str | None = None
    entropy: float | None = None
    coded: int | None = None
    blocks: str = ""
    dtype: str = "float32"
    compressed: bool = False

    @property
    def bytes(self) -> int:
        """`bits` in whole bytes."""
        return -(-self.bits // 8)

    @property
    def ratio(self) -> float:
        """`dense` / `bits`."""
        return self.dense / self.bits if self.bits else math.inf if self.dense else 1.0

    @property
    def distortion(self) -> float | None:
        """||w - Delta(Theta)||^2 / ||w||^2, None without a reference."""
        if self.error is None or self.energy is None:
            return None
        return self.error / self.energy if self.energy else math.inf if self.error else 0.0
