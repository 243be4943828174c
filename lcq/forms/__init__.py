"""What is stored in place of an array: one form a file."""

from lcq.forms.base import FORMS, Form, is_form, leafwise, own, register_form, static
from lcq.forms.cast import Cast
from lcq.forms.coded_trellis import CodedTrellis
from lcq.forms.codes import Codes
from lcq.forms.columns import Columns
from lcq.forms.ell import Ell
from lcq.forms.factors import Factors
from lcq.forms.prepacked import Prepacked
from lcq.forms.registry import Registry
from lcq.forms.relayout import MatrixView, Relayout
from lcq.forms.rotated import Rotated
from lcq.forms.sparse import Sparse
from lcq.forms.sums import Sum
from lcq.forms.trellis import Trellis
from lcq.forms.trellis_columns import TrellisColumns

__all__ = [
    "FORMS",
    "Cast",
    "CodedTrellis",
    "Codes",
    "Columns",
    "Ell",
    "Factors",
    "Form",
    "MatrixView",
    "Prepacked",
    "Registry",
    "Relayout",
    "Rotated",
    "Sparse",
    "Sum",
    "Trellis",
    "TrellisColumns",
    "is_form",
    "leafwise",
    "own",
    "register_form",
    "static",
]


def __dir__() -> list[str]:
    return sorted(__all__)
