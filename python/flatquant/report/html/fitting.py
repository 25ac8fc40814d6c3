"""Figures of calibration: losses, clips, the ends of grids, condition numbers."""

from __future__ import annotations

from functools import partial

import numpy as np

from flatquant.report.html.charts import Bar, Curve, bars, curves
from flatquant.report.html.data import Analysis
from flatquant.report.html.figure import Figure, Key, blocks, panel, place_name, short_name, thin
from flatquant.report.html.frame import whole
from flatquant.report.html.scale import duration, number, percent, signed

_START = Key(name="before fitting", colour="before", dashed=True)
_END = Key(name="after fitting", colour="after")
_SIDES = {
    "max": Key(name="upper end", colour="after"),
    "min": Key(name="lower end", colour="third", dashed=True),
}
_FACTORS = {
    "whole": Key(name="whole transform", colour="after"),
    "left": Key(name="left factor", colour="third", dashed=True),
    "right": Key(name="right factor", colour="fourth", dashed=True),
}
_GRIDS = {
    "stored": Key(name="as stored", colour="after"),
    "symmetric": Key(name="best symmetric grid", colour="third"),
    "asymmetric": Key(name="best asymmetric grid", colour="before"),
}


def losses(analysis: Analysis) -> Figure | None:
    """Loss of every block before and after its calibration."""
    table = analysis.table("fit")
    if table is None or not np.isfinite(table["end"]).any():
        return None
    numbers = list(range(len(table)))
    start, end, seconds = table["start"], table["end"], table["seconds"]
    draw = partial(
        curves,
        [Curve.of(_START, numbers, start), Curve.of(_END, numbers, end)],
        x_label="block",
        y_label="calibration loss (mean square error)",
        height=260,
        log=True,
        x_ticks=whole(numbers),
        place=lambda block: f"block {block:.0f}",
    )
    left = float(np.nanmedian(end / np.where(start > 0, start, np.nan)))
    says = f"lowers the loss of the typical block by {percent(1 - left)}"
    if not left < 0.98:
        says = "hardly lowers the loss of the typical block"
    rows = [
        (str(i), number(float(a)), number(float(b)), f"{number(float(s))} s")
        for i, a, b, s in zip(numbers, start, end, seconds, strict=True)
    ]
    return Figure(
        key="losses",
        title=f"Calibration took {duration(float(np.nansum(seconds)))} and {says}",
        caption="Error of a block's output on the calibration text, before its transforms and "
        "clips were fitted and after.",
        panels=(panel("", draw),),
        keys=(_START, _END),
        head=("block", "before", "after", "time"),
        rows=thin(rows),
        source="fit",
    )


def clips(analysis: Analysis) -> Figure | None:
    """Clip ratios over the layers."""
    table = analysis.table("clips")
    if table is None:
        return None
    draw = partial(
        curves,
        x_label="layer",
        y_label="share of the range that is kept",
        height=180,
        among=[*table["ratio"].tolist(), 1.0],
        level=1.0,
        x_ticks=whole(sorted(table.unique("layer"))),
        place=lambda layer: f"layer {layer:.0f}",
        form=percent,
    )
    panels, rows = [], []
    for (where,), part in table.groups("where").items():
        lines = {side: part.where(side=side) for side in _SIDES}
        shown = [
            Curve.of(_SIDES[side], line["layer"], line["ratio"])
            for side, line in lines.items()
            if len(line)
        ]
        panels.append(panel(place_name(where), partial(draw, shown), 3))
        for curve in shown:
            middle, least = float(np.nanmedian(curve.y)), float(np.nanmin(curve.y))
            rows.append((place_name(where), curve.name, percent(middle), percent(least)))
    least, middle = float(np.nanmin(table["ratio"])), float(np.nanmedian(table["ratio"]))
    title = "Nothing is clipped: every range is kept whole"
    if least < 0.999:
        title = (
            f"Clips keep {percent(middle)} of the typical range, {percent(least)} of the tightest"
        )
    return Figure(
        key="clips",
        title=title,
        caption="Values beyond a clip are cut off, so that the others get finer steps. 100 % keeps "
        "the whole range of a token.",
        panels=tuple(panels),
        keys=tuple(key for side, key in _SIDES.items() if side in table.unique("side")),
        head=("where", "side", "median", "tightest"),
        rows=tuple(rows),
        source="clips",
        across=3,
    )


def ranges(analysis: Analysis) -> Figure | None:
    """Error of the weights as stored and on the best symmetric and asymmetric grids."""
    table = analysis.table("ranges")
    if table is None:
        return None
    groups: dict[str, list[Bar]] = {}
    rows = []
    for (linear, grid), part in table.groups("linear", "grid").items():
        key = _GRIDS[grid]
        low, high, error = (
            float(np.nanmedian(part[name])) for name in ("low", "high", "relative_error")
        )
        bar = Bar(name=key.name, colour=key.colour, value=error)
        groups.setdefault(short_name(linear), []).append(bar)
        rows.append((short_name(linear), key.name, number(low), number(high), percent(error)))
    best = {
        grid: float(np.nanmedian(part["relative_error"]))
        for (grid,), part in table.groups("grid").items()
    }
    title = "How well the weights fit their grids"
    if best.keys() == _GRIDS.keys() and best["stored"] > 0:
        kept, free = (best[grid] / best["stored"] - 1 for grid in ("symmetric", "asymmetric"))
        title = (
            f"Searched ends would change the weights' error by {signed(kept)} on symmetric grids "
            f"and by {signed(free)} on asymmetric ones"
        )
    return Figure(
        key="ranges",
        title=title,
        caption="Relative error of the weights, median over the layers: as they are stored, and "
        "rounded to nearest on the grid whose ends a search found best.",
        panels=(panel("", partial(bars, groups, x_label="relative error", form=percent)),),
        keys=blocks(key for grid, key in _GRIDS.items() if grid in best),
        head=("linear", "grid", "lower end", "upper end", "relative error"),
        rows=tuple(rows),
        source="ranges",
    )


def conditions(analysis: Analysis) -> Figure | None:
    """Condition numbers of the transforms over the layers."""
    table = analysis.table("conditions")
    if table is None or not np.isfinite(table["condition"]).any():
        return None
    draw = partial(
        curves,
        x_label="layer",
        y_label="condition number",
        height=180,
        log=True,
        level=1.0,
        among=table["condition"].tolist(),
        x_ticks=whole(sorted(table.unique("layer"))),
        place=lambda layer: f"layer {layer:.0f}",
    )
    panels, rows = [], []
    for (site,), part in table.groups("site").items():
        factors = [factor for factor in _FACTORS if factor in part.unique("factor")]
        if len(factors) == 2:  # the one factor there is, is the whole
            factors = factors[:1]
        lines = [part.where(factor=factor) for factor in factors]
        shown = [
            Curve.of(_FACTORS[factor], line["layer"], line["condition"])
            for factor, line in zip(factors, lines, strict=True)
        ]
        panels.append(panel(place_name(site), partial(draw, shown[::-1]), 3))
        middle, most = float(np.nanmedian(shown[0].y)), float(np.nanmax(shown[0].y))
        rows.append((place_name(site), number(middle), number(most)))
    worst = int(np.nanargmax(table["condition"]))
    value, site = float(table["condition"][worst]), str(table["site"][worst])
    title = "All transforms are rotations: their condition is 1"
    if value > 1.01:
        where = place_name(site)[0].lower() + place_name(site)[1:]
        layer = table["layer"][worst]
        title = f"The worst condition of a transform is {number(value)}: {where}, layer {layer}"
    return Figure(
        key="conditions",
        title=title,
        caption="1 is a rotation, which loses nothing. A transform of a large condition number "
        "magnifies errors when it is undone.",
        panels=tuple(panels),
        keys=tuple(key for factor, key in _FACTORS.items() if factor in table.unique("factor")),
        head=("site", "median", "largest"),
        rows=tuple(rows),
        source="conditions",
        across=3,
    )
