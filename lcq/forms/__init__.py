"""What is stored in place of an array: one form a file."""

from lcq.forms.base import Form, is_form, leafwise, own, register_form, static
from lcq.forms.cast import Cast
from lcq.forms.codes import Codes
from lcq.forms.factors import Factors
from lcq.forms.sparse import Sparse
from lcq.forms.sums import Sum

__all__ = ["Cast", "Codes", "Factors", "Form", "Sparse", "Sum", "is_form", "leafwise", "own", "register_form", "static"]
