"""What is stored in place of an array: one form a file."""

from lcq.forms.cast import Cast as Cast
from lcq.forms.checks import check_shape as check_shape
from lcq.forms.codes import Codes as Codes
from lcq.forms.factors import Factors as Factors
from lcq.forms.restored import check_restored as check_restored
from lcq.forms.sparse import Sparse as Sparse
from lcq.forms.sums import Sum as Sum
