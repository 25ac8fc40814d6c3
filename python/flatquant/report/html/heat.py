"""Heat-maps as drawings: a grid of cells, its colours, and their key."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from flatquant.report.html import palette, svg
from flatquant.report.html import scale as scales
from flatquant.report.html.frame import label_room, thinned
from flatquant.report.html.scale import Scale
from flatquant.report.html.svg import Drawing


@dataclass(frozen=True)
class Heat:
    """The colours of a heat-map: from low to high, evenly over logarithms or over the values.

    A low end above the high one turns the ramp round: the least value gets the strong colour.
    """

    low: float
    high: float
    log: bool = True

    @classmethod
    def of(cls, *grids: NDArray[np.float64], log: bool = True, spared: float = 0) -> Heat:
        """The span of all finite values, above 0 if logarithmic; it is never empty.

        `spared` percent of them at either end do not count.
        """
        values = np.concatenate([grid.ravel() for grid in grids])
        values = values[np.isfinite(values) & ((values > 0) | (not log))]
        if not len(values):
            return cls(1.0, 10.0, log)
        low, high = (float(end) for end in np.percentile(values, (spared, 100 - spared)))
        if log:
            low = max(low, high * 1e-6)
        if high <= low * (1 + 1e-9) if log else high <= low:
            low, high = (low / 2, high * 2) if log else (low - 0.5, high + 0.5)
        return cls(low, high, log)

    def codes(self, grid: NDArray[np.float64]) -> NDArray[np.uint8]:
        """uint8 steps 1..255 of the ramp, 0 where there is no value."""
        with np.errstate(invalid="ignore", divide="ignore"):
            if self.log:
                share = np.log(grid / self.low) / math.log(self.high / self.low)
            else:
                share = (grid - self.low) / (self.high - self.low)
        share = np.clip(np.where(np.isneginf(share), 0, share), 0, 1)
        codes = np.where(np.isfinite(share), 1 + np.round(254 * np.nan_to_num(share)), 0)
        return codes.astype(np.uint8)

    def key(self, label: str, width: int = 300) -> Drawing:
        """The legend: the ramp with ticks, and what it means."""
        left, right = 14.0, width - 14.0
        ends = (left, right) if self.low < self.high else (right, left)
        scale = Scale(min(self.low, self.high), max(self.low, self.high), *ends, self.log)
        steps = np.arange(1, 256, dtype=np.uint8)[None, :]
        parts = [svg.text(left, 11, label, "axis"), _images(steps, left, 18, right - left, 10)]
        for tick in scale.ticks(5):
            parts.append(svg.line(scale(tick), 28, scale(tick), 32, "base"))
            parts.append(svg.text(scale(tick), 43, scales.number(tick), "tick", "middle"))
        return Drawing(width=width, height=47, body=svg.join(parts))


def heat_map(
    grid: NDArray[np.float64],
    colours: Heat,
    *,
    x_label: str,
    y_label: str,
    x_ticks: Mapping[float, str],
    y_ticks: Mapping[float, str],
    tip: Callable[[int, int, int, int], str],
    width: int = 340,
    height: int | None = None,
    most: tuple[int, int] = (12, 32),
) -> Drawing:
    """A grid of coloured cells.

    Args:
        grid: float64 [rows, columns], the first row on top; NaN is left open.
        y_label: stands above the axis; "" for rows that have names.
        x_ticks, y_ticks: cell coordinates (0.5 is the middle of the first) -> label.
        tip: what stands in the cells rows a..b, columns c..d (ends excluded).
        height: of the drawing; None: a little less than its width.
        most: areas with a tip of their own, down and across.
    """
    height = round(0.85 * width) if height is None else height
    rows, columns = grid.shape
    left, right = label_room(list(y_ticks.values())), width - 12.0
    top, bottom = 22.0 if y_label else 2.0, height - 38.0
    x, y = Scale(0, columns, left, right), Scale(0, rows, top, bottom)
    parts = [svg.text(0, 11, y_label, "axis")] if y_label else []
    parts.append(_images(colours.codes(grid), left, top, right - left, bottom - top))
    for value, label in thinned(y_ticks, bottom - top, upright=True).items():
        parts.append(svg.text(left - 6, y(value) + 3.8, label, "tick", "end"))
    for value, label in thinned(x_ticks, right - left).items():
        parts.append(svg.text(x(value), bottom + 15, label, "tick", "middle"))
    parts.append(svg.text((left + right) / 2, bottom + 32, x_label, "axis", "middle"))
    down = np.linspace(0, rows, min(rows, most[0]) + 1).round().astype(int).tolist()
    across = np.linspace(0, columns, min(columns, most[1]) + 1).round().astype(int).tolist()
    areas = svg.join(
        svg.hit(x(c), y(a), x(d) - x(c), y(b) - y(a), tip(a, b, c, d))
        for a, b in pairwise(down)
        for c, d in pairwise(across)
    )
    return Drawing(width=width, height=height, body=svg.join(parts), areas=areas)


def _images(codes: NDArray[np.uint8], x: float, y: float, width: float, height: float) -> Markup:
    """The same cells twice, in the colours of either theme; the style sheet shows one."""
    return svg.join(
        svg.tag(
            "image",
            class_=f"cells {theme}",
            href=svg.png(codes, palette.ramp(theme)),
            x=x,
            y=y,
            width=width,
            height=height,
            preserveAspectRatio="none",
        )
        for theme in palette.THEMES
    )
