"""A line of a table: what one leaf costs, or several together."""

import math
from typing import NamedTuple


class Row(NamedTuple):
    """One leaf, or a sum of leaves.

    Attributes:
        path: Path of the leaf in the tree.
        shape: Shape of the leaf; () in sums.
        form: What is stored, in words.
        dense: Bits of the leaf as it was, in its own dtype: what every ratio compares with.
        bits: Bits of what is stored, codes at a fixed width; what joint leaves share counts at the first of them.
        error: Squared error ||w - Delta(Theta)||^2; None without a reference.
        energy: Squared norm ||w||^2 of the reference; None without one.
        rule: The pattern that decides, in a dry run.
        scheme: The scheme that the rule asks for, in a dry run.
        entropy: Bits with codes at their entropy; None where there are no concrete arrays.
        coded: Bits in an entropy-coded file, names and digests aside; None where there are no concrete arrays.
        blocks: Axes along which it has scales, codebooks or groups of their own, such as "axis 3", or "32 of axis 0,
            axis 1" for one for each 32; "" for one in all.
        dtype: Dtype of the leaf as it was; of several leaves, all there are.
        compressed: Whether a form is stored; in a sum, for any leaf.
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
