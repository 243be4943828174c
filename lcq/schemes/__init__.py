"""How an array becomes a form: one family of C steps a file. A scheme sees arrays, never trees."""

from lcq.schemes.additive import Additive
from lcq.schemes.base import SCHEMES, Quantizer, Scheme
from lcq.schemes.cast import Cast
from lcq.schemes.kmeans import KMeans
from lcq.schemes.levels import Binary, Levels, PowersOfTwo, Ternary
from lcq.schemes.lowrank import LowRank
from lcq.schemes.prune import Prune
from lcq.schemes.uniform import Uniform

__all__ = [
    "SCHEMES",
    "Additive",
    "Binary",
    "Cast",
    "KMeans",
    "Levels",
    "LowRank",
    "PowersOfTwo",
    "Prune",
    "Quantizer",
    "Scheme",
    "Ternary",
    "Uniform",
]
