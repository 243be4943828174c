"""Rules chosen, written down, and previewed."""

from lcq.plans.allocation import Allocation, Choice, pareto
from lcq.plans.dry_run import dry_run
from lcq.plans.plan import Plan, parse_plan, read_plan

__all__ = ["Allocation", "Choice", "Plan", "dry_run", "pareto", "parse_plan", "read_plan"]


def __dir__() -> list[str]:
    return sorted(__all__)
