"""Charts as drawings: curves over an axis, and bars from a baseline."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from flatquant.report.html import scale as scales
from flatquant.report.html import svg
from flatquant.report.html.figure import Key
from flatquant.report.html.frame import Frame, frame, label_room
from flatquant.report.html.scale import Scale
from flatquant.report.html.svg import Drawing

_ROW = 15  # height of a bar
_DOT_ROOM = 12  # pixels between points that are marked


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line of a chart.

    Attributes:
        name: as in the legend.
        colour: one of the palette's.
        x, y: points; those that are not finite are left out and part the line.
        low, high: ends of a band around it.
        dashed: a second sign beside the colour.
    """

    name: str
    colour: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    dashed: bool = False

    @classmethod
    def of(cls, key: Key, x: Iterable[float], y: Iterable[float]) -> Curve:
        """The line that an entry of a legend names."""
        xs, ys = [float(value) for value in x], [float(value) for value in y]
        return cls(name=key.name, colour=key.colour, dashed=key.dashed, x=xs, y=ys)


def curves(
    drawn: Sequence[Curve],
    *,
    x_label: str,
    y_label: str,
    width: int = 340,
    height: int = 220,
    log: bool = False,
    zero: bool = False,
    log_x: bool = False,
    x_ticks: Mapping[float, str] | None = None,
    level: float | None = None,
    least: float = -math.inf,
    among: Sequence[float] = (),
    place: Callable[[float], str] = str,
    form: Callable[[float], str] = scales.number,
) -> Drawing:
    """Lines over a common axis.

    Args:
        level: a value that a faint line marks.
        least: where the y axis begins at the earliest; values below lie on its end.
        among: further values that the y axis must hold, so that panels share it.
        place: what the tip calls a point on the x axis.
    """
    shown = [*among, *([] if level is None else [level])]
    for curve in drawn:
        for values in (curve.y, curve.low, curve.high):
            shown.extend(() if values is None else values)
    shown = [value if math.isnan(value) else max(value, least) for value in shown]
    xs = sorted({float(x) for curve in drawn for x in curve.x})
    area = frame(
        width=width,
        height=height,
        x_values=xs,
        y_values=shown,
        x_label=x_label,
        y_label=y_label,
        log=log,
        zero=zero,
        log_x=log_x,
        x_ticks=x_ticks,
        form=form,
    )
    parts = [area.axes()]
    if level is not None:
        parts.append(svg.line(area.left, area.y(level), area.right, area.y(level), "level"))
    parts += [_band(area, curve) for curve in drawn]
    parts += [_stroke(area, curve) for curve in drawn]
    areas = _strips(area, xs, drawn, place, form)
    return Drawing(width=width, height=height, body=svg.join(parts), areas=areas)


def _visible(area: Frame, value: float) -> bool:
    return math.isfinite(value) and (value > 0 or not area.y.log)


def _band(area: Frame, curve: Curve) -> Markup:
    if curve.low is None or curve.high is None:
        return Markup()
    points = [
        (area.x(x), area.y(low), area.y(high))
        for x, low, high in zip(curve.x, curve.low, curve.high, strict=True)
        if _visible(area, low) and _visible(area, high)
    ]
    outline = [(x, low) for x, low, _ in points] + [(x, high) for x, _, high in points[::-1]]
    return svg.path(outline, f"band {curve.colour}") if len(points) > 1 else Markup()


def _stroke(area: Frame, curve: Curve) -> Markup:
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(curve.x, curve.y, strict=True):
        if _visible(area, y):
            runs[-1].append((area.x(x), area.y(y)))
        elif runs[-1]:
            runs.append([])
    style = f"curve {curve.colour}{' dashed' if curve.dashed else ''}"
    few = area.right - area.left >= _DOT_ROOM * len(curve.x)
    dots = [
        svg.tag("circle", cx=float(x), cy=float(y), r=2.2, class_=f"dot {curve.colour}")
        for run in runs
        for x, y in run
        if few or len(run) == 1
    ]
    return svg.join([*(svg.path(run, style) for run in runs if len(run) > 1), *dots])


def _strips(
    area: Frame,
    xs: Sequence[float],
    drawn: Sequence[Curve],
    place: Callable[[float], str],
    form: Callable[[float], str],
) -> Markup:
    """Areas that tell all values above one point of the x axis."""
    values = [dict(zip(map(float, curve.x), curve.y, strict=True)) for curve in drawn]
    pixels = [area.x(x) for x in xs]
    edges = [area.left, *((a + b) / 2 for a, b in pairwise(pixels))]
    edges.append(area.right)
    strips = []
    for index, x in enumerate(xs):
        tips = [
            f"{curve.name} {form(known[x])}"
            for curve, known in zip(drawn, values, strict=True)
            if x in known
        ]
        left, right = edges[index], edges[index + 1]
        tip = "|".join([place(x), *tips])
        strips.append(svg.hit(left, area.top, right - left, area.bottom - area.top, tip))
    return svg.join(strips)


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar of a row: its name in the legend, a colour, a value."""

    name: str
    colour: str
    value: float


def bars(
    rows: Mapping[str, Sequence[Bar]],
    *,
    x_label: str,
    width: int = 340,
    log: bool = False,
    base: float | None = None,
    among: Sequence[float] = (),
    form: Callable[[float], str] = scales.number,
) -> Drawing:
    """Rows of horizontal bars that grow from `base`, each with its value written beside it.

    Args:
        rows: label -> bars under one another.
        base: where bars begin; None: at 0, or the start of a logarithmic axis.
        among: further values that the axis must hold, so that panels share it.
    """
    values = [bar.value for group in rows.values() for bar in group]
    values += [*among, *([] if base is None else [base])]
    left = label_room(list(rows))
    room = 6.6 * max((len(form(value)) for value in values), default=1) + 8
    axis = scales.fit(values, left, width - room, log=log, zero=not log)
    begin = axis.low if base is None else base
    if base is None and not log:
        begin = 0.0
    gap = 9
    height = 8 + sum(_ROW * len(group) + gap for group in rows.values()) + 34
    bottom = float(height - 34)
    parts, areas = [], []
    for tick in axis.ticks(4):
        parts.append(svg.line(axis(tick), 4, axis(tick), bottom, "grid"))
        parts.append(svg.text(axis(tick), bottom + 14, form(tick), "tick", "middle"))
    y = 8.0
    for label, group in rows.items():
        middle = y + _ROW * len(group) / 2
        parts.append(svg.text(left - 8, middle + 4, label, "name", "end"))
        tips = [label, *(f"{bar.name} {form(bar.value)}" for bar in group)]
        for bar in group:
            parts.append(_bar(axis, begin, bar, y, form))
            y += _ROW
        tall = _ROW * len(group)
        areas.append(svg.hit(0, y - tall - 2, width, tall + 4, "|".join(tips)))
        y += gap
    parts.append(svg.line(axis(begin), 4, axis(begin), bottom, "base"))
    parts.append(svg.text((left + width - room) / 2, height - 4, x_label, "axis", "middle"))
    return Drawing(width=width, height=height, body=svg.join(parts), areas=svg.join(areas))


def _bar(axis: Scale, begin: float, bar: Bar, y: float, form: Callable[[float], str]) -> Markup:
    if not math.isfinite(bar.value) or (axis.log and bar.value <= 0):
        return svg.text(axis(begin) + 4, y + 11, "no value", "tick")
    left, right = sorted((axis(begin), axis(bar.value)))
    size = {"width": max(right - left, 1.0), "height": _ROW - 3.0}
    shape = svg.tag("rect", x=left, y=y + 1.5, rx=1.5, **size, class_=f"bar {bar.colour}")
    return svg.join([shape, svg.text(right + 4, y + 11.5, form(bar.value), "value")])
