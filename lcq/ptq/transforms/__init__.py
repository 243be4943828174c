"""Changes of parameters that leave a function as it is, and make its weights easier to compress."""

from lcq.ptq.transforms.activation_scales import activation_aware
from lcq.ptq.transforms.base import Transform, Transformed, TransformRecord
from lcq.ptq.transforms.cross_layer import equalize
from lcq.ptq.transforms.rotation import rotate

__all__ = ["Transform", "TransformRecord", "Transformed", "activation_aware", "equalize", "rotate"]


def __dir__() -> list[str]:
    return sorted(__all__)
