"""Figures of flatness: sorted channel magnitudes, their peaks over the depth, kurtosis."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flatquant.report.html.charts import Bar, Curve, bars, curves
from flatquant.report.html.data import Analysis, Table
from flatquant.report.html.figure import (
    AFTER,
    BEFORE,
    Figure,
    Key,
    blocks,
    panel,
    place_name,
    short_name,
)
from flatquant.report.html.frame import whole
from flatquant.report.html.scale import number, times

_NORMAL = 3.0  # kurtosis of a normal distribution
_LEAST = 0.1  # over the median: a dead channel does not stretch the axis further
_OF = {"input": "activations", "weight": "weights"}
WHEN: Mapping[str, Key] = {"before": BEFORE, "after": AFTER}

Curves = dict[tuple[int, str, str], tuple[NDArray[Any], NDArray[Any]]]


def change(first: float, last: float, what: str, unit: str) -> str:
    """A sentence on how a ratio changed, whichever way it went."""
    if not math.isfinite(last):
        return f"{what} is {times(first)} {unit}"
    if abs(last / first - 1) < 0.02:
        return f"{what} stays at {times(first)} {unit}"
    verb = "falls" if last < first else "grows"
    return f"{what} {verb} from {times(first)} {unit} to {times(last)}"


def _sorted(table: Table) -> Curves:
    """Layer, site and when -> percent of the channels that are as large, magnitudes.

    Magnitudes are over the median's; the largest comes first, at half the share of a point.
    """
    found: Curves = {}
    for key, part in table.groups("layer", "site", "when").items():
        order = np.argsort(-part["quantile"])
        quantile, values = part["quantile"][order], part["magnitude"][order]
        middle = float(np.interp(0.5, quantile[::-1], values[::-1]))
        share = 100 * (np.arange(len(values)) + 0.5) / len(values)
        found[key] = share, values / middle if middle > 0 else values * np.nan
    return found


def _peak(drawn: Curves, layer: int, site: str, when: str) -> float:
    """The largest channel over the median one; NaN where it was not measured."""
    key = (layer, site, when)
    return float(drawn[key][1][0]) if key in drawn else float("nan")


def _keys(table: Table) -> tuple[Key, ...]:
    return tuple(key for when, key in WHEN.items() if when in table.unique("when"))


def channels(analysis: Analysis) -> Figure | None:
    """Sorted channel maxima of one layer, before and after."""
    table = analysis.table("magnitudes")
    table = None if table is None else table.where(of="input")
    if table is None or not len(table):
        return None
    layer = _typical(analysis, table)
    drawn, sites = _sorted(table.where(layer=layer)), table.unique("site")
    draw = partial(
        curves,
        x_label="channels, largest first (%, logarithmic)",
        y_label="largest magnitude (median channel = 1)",
        log=True,
        log_x=True,
        x_ticks=whole((1, 3, 10, 30, 100)),
        level=1.0,
        least=_LEAST,
        among=[max(float(value), _LEAST) for _, values in drawn.values() for value in values],
        place=lambda share: f"{number(share)} % of the channels are as large",
        form=times,
    )
    ends = {when: {site: _peak(drawn, layer, site, when) for site in sites} for when in WHEN}
    lines = {
        site: [
            Curve.of(key, *drawn[layer, site, when])
            for when, key in WHEN.items()
            if (layer, site, when) in drawn
        ]
        for site in sites
    }
    worst = max(sites, key=lambda site: float(np.nan_to_num(ends["before"][site])))
    return Figure(
        key="channels",
        title=change(
            ends["before"][worst],
            ends["after"][worst],
            f"Layer {layer}, input of {short_name(worst)}: the largest channel",
            "the median channel",
        ),
        caption=(
            "For every input channel the largest magnitude over the text, sorted and divided by "
            "that of the median channel: a level line is a flat input, which a few bits describe "
            "well."
        ),
        panels=tuple(panel(place_name(site), partial(draw, lines[site]), 2) for site in sites),
        keys=_keys(table),
        head=("input of", "largest channel before, × median", "after, × median"),
        rows=tuple((short_name(site), *(number(ends[w][site]) for w in WHEN)) for site in sites),
        source="magnitudes",
        across=2,
    )


def _typical(analysis: Analysis, table: Table) -> int:
    """The layer of the map of activations, or else one in the middle."""
    layers = sorted(table.unique("layer"))
    mapped = analysis.table("heatmap")
    chosen = layers[len(layers) // 2] if mapped is None else int(mapped["layer"][0])
    return chosen if chosen in layers else layers[len(layers) // 2]


def peaks(analysis: Analysis) -> Figure | None:
    """The largest over the median channel, over the depth of the model."""
    table = analysis.table("magnitudes")
    if table is None:
        return None
    panels, rows = [], []
    worst: tuple[float, float, int, str] | None = None
    for of, name in _OF.items():
        part = table.where(of=of)
        drawn, layers = _sorted(part), sorted(part.unique("layer"))
        lines = {
            (site, when): [_peak(drawn, layer, site, when) for layer in layers]
            for site in part.unique("site")
            for when in WHEN
        }
        draw = partial(
            curves,
            x_label="layer",
            y_label="largest channel (median = 1)",
            height=180,
            log=True,
            level=1.0,
            among=[value for line in lines.values() for value in line],
            x_ticks=whole(layers),
            place=lambda layer: f"layer {layer:.0f}",
            form=times,
        )
        for site in part.unique("site"):
            shown = [Curve.of(WHEN[when], layers, lines[site, when]) for when in WHEN]
            label = place_name(site) if of == "input" else f"Weights of {short_name(site)}"
            panels.append(panel(label, partial(draw, shown), 4))
            rows.append((name, short_name(site), *(_median(lines[site, w]) for w in WHEN)))
            for layer in layers if of == "input" else ():
                first, last = (_peak(drawn, layer, site, when) for when in WHEN)
                if worst is None or first > worst[0]:
                    worst = first, last, layer, site
    if worst is None:
        return None
    return Figure(
        key="peaks",
        title=change(
            *worst[:2],
            f"The highest peak, input of {short_name(worst[3])} in layer {worst[2]},",
            "the median channel",
        ),
        caption=(
            "The largest magnitude of a channel over that of the median channel, layer by layer. "
            "1 is perfectly flat."
        ),
        panels=tuple(panels),
        keys=_keys(table),
        head=("of", "site", "median before", "median after"),
        rows=tuple(rows),
        source="magnitudes",
        across=4,
    )


def _median(values: Sequence[float]) -> str:
    return number(float(np.nanmedian(values))) if np.isfinite(values).any() else "–"


def kurtosis(analysis: Analysis) -> Figure | None:
    """Bars of kurtosis by layer type, from that of a normal distribution."""
    table = analysis.table("kurtosis")
    if table is None:
        return None
    groups: dict[str, dict[str, list[Bar]]] = {of: {} for of in _OF}
    tops = dict.fromkeys(WHEN, float("nan"))
    for (of, linear, when), part in table.groups("of", "linear", "when").items():
        if not np.isfinite(part["kurtosis"]).any():
            continue
        value = float(np.nanmedian(part["kurtosis"]))
        bar = Bar(name=when, colour=WHEN[when].colour, value=value)
        groups[of].setdefault(short_name(linear), []).append(bar)
        if of == "input":
            tops[when] = float(np.fmax(tops[when], value))
    title = "Kurtosis of weights and activations"
    if np.isfinite(list(tops.values())).all():
        first, last = number(tops["before"]), number(tops["after"])
        verb = "stays at" if first == last else f"goes from {first} to"
        title = f"The heaviest tails of activations: kurtosis {verb} {last}"
    draw = partial(bars, x_label="kurtosis (normal distribution = 3)", log=True, base=_NORMAL)
    return Figure(
        key="kurtosis",
        title=title,
        caption=(
            "Kurtosis says how heavy the tails are: 3 is a normal distribution, 1.8 a uniform one. "
            "Bars start at 3; each is the median over the layers."
        ),
        panels=tuple(
            panel(name.capitalize(), partial(draw, groups[of]), 2)
            for of, name in _OF.items()
            if groups[of]
        ),
        keys=blocks(_keys(table)),
        head=("of", "linear", *(key.name for key in _keys(table))),
        rows=tuple(
            (_OF[of], label, *(number(bar.value) for bar in group))
            for of in _OF
            for label, group in groups[of].items()
        ),
        source="kurtosis",
        across=2,
    )
