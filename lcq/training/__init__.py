"""Who chooses the weights while a net trains: LC, entropy penalties, smooth binary weights, baselines, finetuning."""

from lcq.training.baselines import IteratedState, StraightThroughState, iterated_direct, straight_through_training
from lcq.training.batch_norm import recalibrate_batch_norm
from lcq.training.block_entropy import block_entropy, entropy_centres
from lcq.training.distill import distill
from lcq.training.extraction import extract
from lcq.training.finetune import finetune
from lcq.training.hemp import HempState, hemp
from lcq.training.lc import LCState, c_step, lc
from lcq.training.penalty import adam_step
from lcq.training.progress import metrics
from lcq.training.schedules import Geometric, PenaltySchedule, geometric, penalty_schedule
from lcq.training.smooth_binary import AnnealedTanh, Binarization, GroupPower, SmoothBinary, StraightSign, smooth_binary
from lcq.training.straight_through import straight_through
from lcq.training.weighing import largest_weight

__all__ = [
    "AnnealedTanh",
    "Binarization",
    "Geometric",
    "GroupPower",
    "HempState",
    "IteratedState",
    "LCState",
    "PenaltySchedule",
    "SmoothBinary",
    "StraightSign",
    "StraightThroughState",
    "adam_step",
    "block_entropy",
    "c_step",
    "distill",
    "entropy_centres",
    "extract",
    "finetune",
    "geometric",
    "hemp",
    "iterated_direct",
    "largest_weight",
    "lc",
    "metrics",
    "penalty_schedule",
    "recalibrate_batch_norm",
    "smooth_binary",
    "straight_through",
    "straight_through_training",
]


def __dir__() -> list[str]:
    return sorted(__all__)
