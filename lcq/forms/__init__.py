"""What is stored in place of an array: one form a file."""

from lcq.forms.base import FORMS, Form, is_form, leafwise, own, register_form, static
from lcq.forms.cast import Cast
from lcq.forms.codes import Codes
from lcq.forms.factors import Factors
from lcq.forms.registry import Registry
from lcq.forms.sparse import Sparse
from lcq.forms.sums import Sum

__all__ = [
    "FORMS",
    "Cast",
    "Codes",
    "Factors",
    "Form",
    "Registry",
    "Sparse",
    "Sum",
    "is_form",
    "leafwise",
    "own",
    "register_form",
    "static",
]
