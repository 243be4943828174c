"""Rounding methods on the statistics of one product: one method a file."""

from lcq.ptq.rounding.base import ROUNDING_METHODS, Rounding
from lcq.ptq.rounding.block_ldl import BlockLDL
from lcq.ptq.rounding.coordinate_descent import Descent
from lcq.ptq.rounding.gpfq import GPFQ, SparseGPFQ
from lcq.ptq.rounding.gptq import GPTQ
from lcq.ptq.rounding.qronos import Qronos
from lcq.ptq.rounding.rtn import RTN
from lcq.ptq.rounding.spfq import SPFQ

__all__ = ["GPFQ", "GPTQ", "ROUNDING_METHODS", "RTN", "SPFQ", "BlockLDL", "Descent", "Qronos", "Rounding", "SparseGPFQ"]


def __dir__() -> list[str]:
    return sorted(__all__)
