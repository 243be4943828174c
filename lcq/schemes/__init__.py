"""How an array becomes a form: one family of C steps a file. A scheme sees arrays, never trees."""

from lcq.schemes.additive import Additive
from lcq.schemes.base import SCHEMES, Quantizer, Scheme
from lcq.schemes.cast import Cast
from lcq.schemes.coded_trellis import CodedTrellis
from lcq.schemes.kmeans import KMeans
from lcq.schemes.levels import Binary, Levels, PowersOfTwo, Ternary
from lcq.schemes.lowrank import LowRank
from lcq.schemes.norms import L0Penalty, L1Ball, L1Penalty
from lcq.schemes.prune import NofM, Prune, PruneGroups
from lcq.schemes.rotated import Rotated
from lcq.schemes.trellis import Trellis
from lcq.schemes.uniform import Uniform

__all__ = [
    "SCHEMES",
    "Additive",
    "Binary",
    "Cast",
    "CodedTrellis",
    "KMeans",
    "L0Penalty",
    "L1Ball",
    "L1Penalty",
    "Levels",
    "LowRank",
    "NofM",
    "PowersOfTwo",
    "Prune",
    "PruneGroups",
    "Quantizer",
    "Rotated",
    "Scheme",
    "Ternary",
    "Trellis",
    "Uniform",
]


def __dir__() -> list[str]:
    return sorted(__all__)
