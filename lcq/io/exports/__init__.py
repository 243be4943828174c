"""Files of other programs, out: one format a file, which registers itself when it is imported here."""

from lcq.io.exports import compressed_tensors as compressed_tensors
from lcq.io.exports import gguf as gguf
from lcq.io.exports import gptq as gptq
from lcq.io.exports import onnx as onnx
from lcq.io.exports import onnx_dequantize as onnx_dequantize
from lcq.io.exports.base import EXPORT_FORMATS, Encoded, ExportFormat, Tensor
from lcq.io.exports.export import export as export
from lcq.io.exports.leaves import Item
from lcq.io.exports.names import Name, llama_names
from lcq.io.exports.qwix import to_qwix
from lcq.io.exports.report import Report, Row

__all__ = [
    "EXPORT_FORMATS",
    "Encoded",
    "ExportFormat",
    "Item",
    "Name",
    "Report",
    "Row",
    "Tensor",
    "export",
    "llama_names",
    "to_qwix",
]


def __dir__() -> list[str]:
    return sorted(__all__)
