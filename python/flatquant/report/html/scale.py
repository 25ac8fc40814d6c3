"""Axes as values: where a number lies, which ticks are shown, and how numbers are written."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

_FEW = 3  # ticks that an axis should have at least
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Scale:
    """Maps low..high to the pixels start..end, on a linear or a logarithmic axis.

    Raises:
        ValueError: a logarithmic axis that does not start above 0.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __post_init__(self) -> None:
        if self.log and self.low <= 0:
            raise ValueError(f"a logarithmic axis starts at {self.low}: it must be above 0")

    def __call__(self, value: float) -> float:
        """The pixel of a value; values outside the axis land on its nearer end."""
        value = min(max(value, self.low), self.high)
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, most: int) -> list[float]:
        """At most about `most` round numbers on the axis."""
        if self.log and len(found := _log_ticks(self.low, self.high, most)) >= _FEW:
            return found
        return _ticks(self.low, self.high, most)


def fit(
    values: Iterable[float], start: float, end: float, *, log: bool = False, zero: bool = False
) -> Scale:
    """The axis that holds all finite values (above 0 if logarithmic), with round ends.

    `zero` lets a linear axis begin at 0. Without any value the axis is 0..1, or 1..10.
    """
    known = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
    if not known:
        return Scale(1.0 if log else 0.0, 10.0 if log else 1.0, start, end, log)
    low, high = min(known), max(known)
    if log:
        if high / low < 1.2:
            low, high = low / 2, high * 2
        span = math.log(high / low)
        return Scale(low * math.exp(-0.04 * span), high * math.exp(0.04 * span), start, end, True)
    low = min(low, 0.0) if zero else low
    if high - low < 1e-12 * max(abs(high), 1.0):
        room = 0.5 * abs(high) or 1.0
        low, high = (low if zero else low - room), high + room
    room = 0.05 * (high - low)
    return Scale(low if zero and low >= 0 else low - room, high + room, start, end)


def _ticks(low: float, high: float, most: int) -> list[float]:
    raw = (high - low) / max(most, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    chosen: list[float] = []
    for digits in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        found = [
            digit * 10.0**power
            for power in range(first, last + 1)
            for digit in digits
            if low <= digit * 10.0**power * 1.000001 and digit * 10.0**power <= high * 1.000001
        ]
        if len(found) <= most or not chosen:
            chosen = found
        if len(chosen) > _FEW:
            break
    step = -(-len(chosen) // max(most, 1))
    return chosen[::step]


def number(value: float, digits: int = 3) -> str:
    """A number for people: three significant digits, thousands apart, powers of ten if extreme."""
    if not math.isfinite(value):
        return "–" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if size < -4 or size >= 7:
        mantissa, power = f"{value:.{digits - 1}e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        written = f"10{str(int(power)).translate(_SUPERSCRIPT)}"
        text = written if mantissa == "1" else f"{mantissa}·{written}"
    else:
        text = f"{value:,.{max(digits - 1 - size, 0)}f}"
        text = text.rstrip("0").rstrip(".") if "." in text else text
    return text.replace("-", "−")


def percent(share: float) -> str:
    """A share as percent: 71.3 %, 0.42 %."""
    return f"{number(100 * share)} %"


def signed(share: float) -> str:
    """A change in percent: +3.1 %, −10.6 %."""
    return f"{'+' if share > 0 else ''}{percent(share)}"


def times(ratio: float) -> str:
    """A ratio: 7.1×."""
    return f"{number(ratio, 2)}×"


def size(count: float) -> str:
    """Bytes as kB, MB or GB (powers of 1000)."""
    for unit, base in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= base:
            return f"{number(count / base)} {unit}"
    return f"{number(count)} bytes"


def duration(seconds: float) -> str:
    """Seconds as s, min or h."""
    if seconds < 90:
        return f"{number(seconds, 2)} s"
    return f"{number(seconds / 60, 2)} min" if seconds < 5400 else f"{number(seconds / 3600, 2)} h"


def finite(values: Iterable[float]) -> list[float]:
    """The values that are numbers."""
    return [float(value) for value in values if np.isfinite(value)]
