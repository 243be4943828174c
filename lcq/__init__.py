"""lcq: compress any JAX function's parameters, and run the result."""

from lcq.base import Form as Form
from lcq.base import Scheme as Scheme
from lcq.base import straight_through as straight_through
from lcq.methods.coupling import adam_step as adam_step
from lcq.methods.coupling import geometric as geometric
from lcq.methods.lc import c_step as c_step
from lcq.methods.lc import extract as extract
from lcq.methods.lc import lc as lc
from lcq.methods.lc import metrics as metrics
from lcq.rules import Rule as Rule
from lcq.schemes.cast import Cast as Cast
from lcq.schemes.levels import Binary as Binary
from lcq.schemes.levels import Levels as Levels
from lcq.schemes.levels import PowersOfTwo as PowersOfTwo
from lcq.schemes.levels import Ternary as Ternary
from lcq.schemes.uniform import Uniform as Uniform
from lcq.tree import compress as compress
from lcq.tree import decompress as decompress
from lcq.tree import ratio as ratio
from lcq.tree import sizes as sizes
