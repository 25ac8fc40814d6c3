"""Figures that are heat-maps: activations, errors over depth and position, noise, sensitivity."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flatquant.report.html.data import Analysis
from flatquant.report.html.errors import KINDS, relative_errors
from flatquant.report.html.figure import Figure, linear_name, panel, short_name, single, thin
from flatquant.report.html.flatness import change
from flatquant.report.html.frame import cells
from flatquant.report.html.heat import Heat, heat_map
from flatquant.report.html.scale import number, times

_FAINT = 0.5  # magnitudes over the map's median that are shown as nothing
_SPARED = 2  # percent of the values at either end that share one colour
_ROW = 26  # height of a row with a name

Grid = NDArray[np.float64]


def activations(analysis: Analysis) -> Figure | None:
    """Magnitudes over channels and tokens, before and after, in the same colours."""
    table = analysis.table("heatmap")
    if table is None:
        return None
    grids: dict[tuple[int, str, str], Grid] = {}
    for key, part in table.groups("layer", "site", "when").items():
        grid = part.pivot("token_bin", "channel_bin", "magnitude")[2]
        if (middle := float(np.nanmedian(grid))) > 0:
            grids[key] = grid / middle
    if not grids:
        return None
    colours = Heat.of(*(np.maximum(grid, _FAINT) for grid in grids.values()))
    layer, site, _ = next(iter(grids))
    ends = {key: float(np.nanmax(grid)) for key, grid in grids.items()}
    rows = []
    for (_, place, when), grid in grids.items():
        token, channel = np.unravel_index(int(np.nanargmax(grid)), grid.shape)
        top = times(float(grid[token, channel]))
        rows.append((short_name(place), when, top, str(token), str(channel)))
    return Figure(
        key="activations",
        title=change(
            ends.get((layer, site, "before"), float("nan")),
            ends.get((layer, site, "after"), float("nan")),
            f"Layer {layer}, input of {short_name(site)}: the largest activation",
            "the median",
        ),
        caption=(
            "Largest magnitude in every bin of channels and tokens, divided by the map's median. "
            "Vertical stripes are outlier channels, horizontal ones outlier tokens. All maps share "
            "one scale of colours."
        ),
        panels=tuple(
            single(f"{when.capitalize()}: input of {short_name(place)}", _magnitudes(grid, colours))
            for (_, place, when), grid in grids.items()
        ),
        scale=colours.key("magnitude (median of the map = 1)"),
        head=("input of", "when", "largest, × median", "in token bin", "in channel bin"),
        rows=tuple(rows),
        source="heatmap",
        across=2,
    )


def _magnitudes(grid: Grid, colours: Heat) -> partial[Any]:
    rows, columns = grid.shape

    def tip(a: int, b: int, c: int, d: int) -> str:
        top = times(float(np.nanmax(grid[a:b, c:d])))
        return f"tokens {a}–{b - 1}, channels {c}–{d - 1} (bins)|largest {top}"

    return partial(
        heat_map,
        grid,
        colours,
        x_label=f"channels in order ({columns} bins)",
        y_label=f"tokens in order ({rows} bins)",
        x_ticks=cells(range(columns)),
        y_ticks=cells(range(rows)),
        tip=tip,
    )


def surface(analysis: Analysis) -> Figure | None:
    """Error over layers and token positions."""
    table = analysis.table("surface")
    if table is None:
        return None
    layers, tokens, grids = relative_errors(table)
    colours = Heat.of(*grids.values(), spared=_SPARED)
    together = grids["mse"]
    first = float(np.nanmean(together[:, 0]))
    rest = float(np.nanmean(together[:, 1:])) if len(tokens) > 1 else first
    says = "all positions err alike"
    if first > 1.5 * rest:
        says = f"the first tokens err {times(first / rest)} as much as the rest"
    elif rest > 1.5 * first:
        says = f"the first tokens err {times(rest / first)} less than the rest"
    quarters = list(range(0, len(tokens), max(len(tokens) // 4, 1)))[:4]
    step = max(len(tokens) // 4, 1)
    rows = [
        (str(layer), *(number(float(np.nanmean(together[i, j : j + step]))) for j in quarters))
        for i, layer in enumerate(layers)
    ]
    return Figure(
        key="surface",
        title=f"Error over depth and position: {says}",
        caption="Squared error over squared size of the output, for every layer and position in "
        "the window. Both maps share one scale of colours, which leaves out the extreme "
        f"{_SPARED} %.",
        panels=tuple(
            single(key.name.capitalize(), _surface(layers, tokens, grids[name], colours))
            for name, key in KINDS.items()
        ),
        scale=colours.key("squared error / squared output"),
        head=("layer", *(f"from token {tokens[j]}" for j in quarters)),
        rows=thin(rows),
        source="surface",
        across=2,
    )


def _surface(layers: list[int], tokens: list[int], grid: Grid, colours: Heat) -> partial[Any]:
    def tip(a: int, b: int, c: int, d: int) -> str:
        layer = f"layer {layers[a]}" if b == a + 1 else f"layers {layers[a]}–{layers[b - 1]}"
        value = number(float(np.nanmean(grid[a:b, c:d])))
        end = str(tokens[d] - 1) if d < len(tokens) else "end"
        return f"{layer}, tokens {tokens[c]}–{end}|mean {value}"

    marks = range(0, len(tokens), max(len(tokens) // 4, 1))
    return partial(
        heat_map,
        grid,
        colours,
        x_label="position in the window (tokens)",
        y_label="layer",
        x_ticks={mark + 0.5: str(tokens[mark]) for mark in marks},
        y_ticks=cells(layers),
        tip=tip,
        most=(40, 8),
    )


def noise(analysis: Analysis) -> Figure | None:
    """Signal over noise of every linear's output, as a map of linears over layers."""
    table = analysis.table("similarity")
    if table is None:
        return None
    linears, layers, grid = table.pivot("linear", "layer", "sqnr_db")
    grid = np.where(np.isfinite(grid), grid, np.nan)
    cosine = table.pivot("linear", "layer", "cosine")[2]
    if not np.isfinite(grid).any():
        return None
    span = Heat.of(grid, log=False, spared=_SPARED)
    colours = Heat(span.high, span.low, log=False)  # noisy is the strong end

    def tip(a: int, b: int, c: int, d: int) -> str:
        where = f"{short_name(linears[a])} of layer {layers[c]}"
        return f"{where}|{number(float(grid[a, c]))} dB|cosine {number(float(cosine[a, c]), 4)}"

    draw = partial(_named_rows, grid, colours, [short_name(name) for name in linears], layers, tip)
    i, j = np.unravel_index(int(np.nanargmin(grid)), grid.shape)
    worst, middle = float(grid[i, j]), float(np.nanmedian(grid))
    rows = tuple(
        (
            short_name(linear),
            number(float(np.nanmedian(grid[k]))),
            number(float(np.nanmin(grid[k]))),
            str(layers[int(np.nanargmin(grid[k]))]),
            number(float(np.nanmin(cosine[k])), 4),
        )
        for k, linear in enumerate(linears)
        if np.isfinite(grid[k]).any()
    )
    return Figure(
        key="noise",
        title=f"The noisiest output is that of {linear_name(linears[i])} in layer {layers[j]}: "
        f"{number(worst)} dB, where the median is {number(middle)} dB",
        caption=(
            "Signal over quantization noise of every linear's output, its block fed with the "
            "floating-point model's hidden states. 10 dB more is a tenth of the noise."
        ),
        panels=(panel("", draw),),
        scale=colours.key("signal over noise (dB), the stronger the noisier"),
        head=("linear", "median dB", "least dB", "in layer", "least cosine"),
        rows=rows,
        source="similarity",
    )


def _named_rows(
    grid: Grid, colours: Heat, names: list[str], layers: list[int], tip: Any, *, width: int
) -> Any:
    """A map of named rows over layers, with a tip in every cell."""
    return heat_map(
        grid,
        colours,
        x_label="layer",
        y_label="",
        x_ticks=cells(layers),
        y_ticks=cells(names),
        tip=tip,
        width=width,
        height=42 + _ROW * len(names),
        most=(len(names), len(layers)),
    )


def sensitivity(analysis: Analysis) -> Figure | None:
    """What quantizing one group of linears alone costs."""
    table = analysis.table("sensitivity")
    if table is None or not np.isfinite(table["kl"]).any():
        return None
    grids = {
        bits: part.pivot("group", "layer", "kl") for (bits,), part in table.groups("bits").items()
    }
    colours = Heat.of(*(grid for _, _, grid in grids.values()))
    panels, rows = [], []
    for bits, (groups, layers, grid) in grids.items():
        names = [_part(group) for group in groups]

        def tip(
            a: int, b: int, c: int, d: int, names: Any = names, at: Any = layers, grid: Any = grid
        ) -> str:
            return f"{names[a]}, layer {at[c]}|KL {number(float(grid[a, c]))} nats"

        draw = partial(_named_rows, grid, colours, names, layers, tip)
        panels.append(panel(f"{bits} bits", draw))
        for name, line in zip(names, grid, strict=True):
            if np.isfinite(line).any():
                middle, top = float(np.nanmedian(line)), int(np.nanargmax(line))
                shown = number(middle), str(layers[top]), number(float(line[top]))
                rows.append((str(bits), name, *shown))
    most = int(np.nanargmax(table["kl"]))
    return Figure(
        key="sensitivity",
        title=f"The most sensitive part is {_part(str(table['group'][most]))} of layer "
        f"{table['layer'][most]}: {number(float(table['kl'][most]))} nats at "
        f"{table['bits'][most]} bits",
        caption="KL divergence of the next token's distribution when only this part is quantized.",
        panels=tuple(panels),
        scale=colours.key("KL divergence (nats)"),
        head=("bits", "part", "median KL", "worst layer", "its KL"),
        rows=thin(rows),
        source="sensitivity",
    )


def _part(name: str) -> str:
    return "the whole block" if name == "block" else short_name(name)
