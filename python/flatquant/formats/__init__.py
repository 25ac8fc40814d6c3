"""Number formats. A new one is a line in `NUMBERS` or `FORMATS`."""

from flatquant.formats.base import FORMATS, INTEGER, OFF, Format
from flatquant.formats.numbers import NUMBERS, FloatNumber
from flatquant.formats.scales import raw_scale, stored_scale

__all__ = [
    "FORMATS",
    "INTEGER",
    "NUMBERS",
    "OFF",
    "FloatNumber",
    "Format",
    "raw_scale",
    "stored_scale",
]
