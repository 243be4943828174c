"""Who chooses the weights without training: one walk over a net, and a rounding method at each product."""

from lcq.ptq import transforms
from lcq.ptq.importance import curvature
from lcq.ptq.quantize import Quantized, Record, quantize
from lcq.ptq.rounding import GPFQ, GPTQ, ROUNDING_METHODS, RTN, SPFQ, BlockLDL, Descent, Qronos, Rounding, SparseGPFQ

__all__ = [
    "GPFQ",
    "GPTQ",
    "ROUNDING_METHODS",
    "RTN",
    "SPFQ",
    "BlockLDL",
    "Descent",
    "Qronos",
    "Quantized",
    "Record",
    "Rounding",
    "SparseGPFQ",
    "curvature",
    "quantize",
    "transforms",
]


def __dir__() -> list[str]:
    return sorted(__all__)
