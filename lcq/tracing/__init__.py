"""Functions as equations: which products a function makes with its parameters."""

from lcq.tracing.contraction import Product
from lcq.tracing.flops import Flops, flops
from lcq.tracing.param_flow import trace
from lcq.tracing.program import Program

__all__ = ["Flops", "Product", "Program", "flops", "trace"]


def __dir__() -> list[str]:
    return sorted(__all__)
