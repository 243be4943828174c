"""Products with forms: one kernel a file, which registers itself when it is imported here."""

from lcq.kernels import code_product as code_product
from lcq.kernels import ell as ell
from lcq.kernels import trellis as trellis
from lcq.kernels.api import binary_matmul, matmul
from lcq.kernels.base import KERNELS, Kernel
from lcq.kernels.code_product import CompiledKernel

__all__ = ["KERNELS", "CompiledKernel", "Kernel", "binary_matmul", "matmul"]


def __dir__() -> list[str]:
    return sorted(__all__)
