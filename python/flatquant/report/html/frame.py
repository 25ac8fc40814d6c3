"""The frame of a chart: margins that fit its labels, grid lines, ticks and axis titles."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from flatquant.report.html import scale as scales
from flatquant.report.html import svg
from flatquant.report.html.scale import Scale

#: Mean width of a character of a label over its size, with some to spare.
_CHARACTER = 6.4
_TOP, _BOTTOM = 30, 38


@dataclass(frozen=True, kw_only=True)
class Frame:
    """Two axes and the rectangle between them.

    Attributes:
        width, height: of the whole drawing.
        x, y: the axes; y.start is the bottom.
        x_label, y_label: with units; the second stands above the axis, not turned.
        x_ticks: position -> what is written there, as far as there is room; None: round numbers.
        form: how the numbers of the y axis are written.
    """

    width: int
    height: int
    x: Scale
    y: Scale
    x_label: str
    y_label: str
    x_ticks: Mapping[float, str] | None = None
    form: Callable[[float], str] = scales.number

    @property
    def left(self) -> float:
        """The left edge of the rectangle."""
        return min(self.x.start, self.x.end)

    @property
    def right(self) -> float:
        """The right edge of the rectangle."""
        return max(self.x.start, self.x.end)

    @property
    def top(self) -> float:
        """The upper edge of the rectangle."""
        return self.y.end

    @property
    def bottom(self) -> float:
        """The lower edge of the rectangle."""
        return self.y.start

    def axes(self) -> Markup:
        """Grid, ticks and titles."""
        parts = [svg.text(0, 11, self.y_label, "axis")]
        for value in self.y.ticks(5):
            y = self.y(value)
            parts.append(svg.line(self.left, y, self.right, y, "grid"))
            parts.append(svg.text(self.left - 6, y + 3.8, self.form(value), "tick", "end"))
        parts.append(svg.line(self.left, self.bottom, self.right, self.bottom, "base"))
        parts.append(self._under())
        return svg.join(parts)

    def _under(self) -> Markup:
        ticks = self.x_ticks
        if ticks is None:
            ticks = {value: scales.number(value) for value in self.x.ticks(6)}
        ticks = thinned(ticks, self.right - self.left)
        middle = (self.left + self.right) / 2
        parts = [
            svg.text(self.x(value), self.bottom + 15, label, "tick", "middle")
            for value, label in ticks.items()
        ]
        parts.append(svg.text(middle, self.bottom + 32, self.x_label, "axis", "middle"))
        return svg.join(parts)


def frame(
    *,
    width: int,
    height: int,
    x_values: Sequence[float],
    y_values: Sequence[float],
    x_label: str,
    y_label: str,
    log: bool = False,
    zero: bool = False,
    log_x: bool = False,
    x_ticks: Mapping[float, str] | None = None,
    form: Callable[[float], str] = scales.number,
) -> Frame:
    """The frame around points; the x axis ends at its outermost values.

    `log` and `zero` are of the y axis.
    """
    top, bottom = float(_TOP), float(height - _BOTTOM)
    y = scales.fit(y_values, bottom, top, log=log, zero=zero)
    labels = [form(value) for value in y.ticks(5)]
    left = label_room(labels)
    low, high = min(x_values, default=0.0), max(x_values, default=1.0)
    if low == high:
        low, high = low - 0.5, high + 0.5
    x = Scale(low, high, left, width - 12.0, log_x)
    return Frame(
        width=width,
        height=height,
        x=x,
        y=y,
        x_label=x_label,
        y_label=y_label,
        x_ticks=x_ticks,
        form=form,
    )


def label_room(labels: Sequence[str]) -> float:
    """The width that labels beside an axis need."""
    return 10 + _CHARACTER * max((len(label) for label in labels), default=1)


def whole(numbers: Sequence[int]) -> dict[float, str]:
    """Ticks at whole numbers: layers, blocks."""
    return {float(value): str(value) for value in numbers}


def cells(labels: Sequence[object]) -> dict[float, str]:
    """Ticks in the middle of the cells of a heat-map."""
    return {index + 0.5: str(label) for index, label in enumerate(labels)}


def thinned(ticks: Mapping[float, str], room: float, upright: bool = False) -> dict[float, str]:
    """Every tick, or every 2nd, 5th, 10th, ... until they do not touch.

    Args:
        room: length of the axis; `upright`: it runs up the page.
    """
    need = 15.0 if upright else 12 + _CHARACTER * max(map(len, ticks.values()), default=1)
    most = max(int(room / need), 1)
    scale = (factor * 10**power for power in range(9) for factor in (1, 2, 5))
    step = next(step for step in scale if -(-len(ticks) // step) <= most)
    return dict(list(ticks.items())[::step])
