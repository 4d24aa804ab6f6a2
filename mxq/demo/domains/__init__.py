"""The domains of the demo corpus: one module each, and the table of their writers."""

from collections.abc import Callable
from types import MappingProxyType

from mxq.demo.domains.arithmetic import write_arithmetic
from mxq.demo.domains.calendar import write_calendar
from mxq.demo.domains.programs import write_programs
from mxq.demo.domains.prose import write_prose
from mxq.demo.domains.records import write_records
from mxq.demo.source import Source

WRITERS: MappingProxyType[str, Callable[[Source], None]] = MappingProxyType(
    {
        "arithmetic": write_arithmetic,
        "calendar": write_calendar,
        "records": write_records,
        "programs": write_programs,
        "prose": write_prose,
    }
)
"""Each writes one document of 200 to 600 characters into an empty source."""

__all__ = ["WRITERS"]
