"""Tables and pages about compressed trees."""

from lcq.reporting.html import write_page
from lcq.reporting.summary import Row, Table, table

__all__ = ["Row", "Table", "table", "write_page"]


def __dir__() -> list[str]:
    return sorted(__all__)
