"""Figures of what quantization does to outputs and weights, by layer and by column."""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

from flatquant.report.html.charts import Curve, curves
from flatquant.report.html.data import Analysis, Table
from flatquant.report.html.figure import Figure, Key, linear_name, panel, short_name, thin
from flatquant.report.html.frame import whole
from flatquant.report.html.scale import number, percent

KINDS = {
    "mse": Key(name="all blocks before it quantized too", colour="after"),
    "mse_alone": Key(name="this block alone", colour="third", dashed=True),
}


def relative_errors(
    table: Table,
) -> tuple[list[int], list[int], dict[str, NDArray[np.float64]]]:
    """Layers, token positions, and squared errors over squared outputs [layer, token]."""
    layers, tokens, power = table.pivot("layer", "token", "power")
    grids = {name: table.pivot("layer", "token", name)[2] for name in KINDS}
    with np.errstate(divide="ignore", invalid="ignore"):
        grids = {name: np.where(power > 0, grid / power, np.nan) for name, grid in grids.items()}
    return layers, tokens, grids


def by_layer(analysis: Analysis) -> Figure | None:
    """Error of every block's output, alone and after all blocks before it."""
    table = analysis.table("surface")
    if table is None:
        return None
    layers, _, grids = relative_errors(table)
    means = {name: np.nanmean(grid, axis=1) for name, grid in grids.items()}
    alone, last = means["mse_alone"], float(means["mse"][-1])
    worst = layers[int(np.nanargmax(alone))]
    draw = partial(
        curves,
        [Curve.of(key, layers, means[name]) for name, key in KINDS.items()],
        x_label="layer",
        y_label="squared error / squared output, mean over tokens",
        height=260,
        log=True,
        x_ticks=whole(layers),
        place=lambda layer: f"layer {layer:.0f}",
    )
    rows = [
        (str(layer), *(number(float(means[name][i])) for name in KINDS))
        for i, layer in enumerate(layers)
    ]
    return Figure(
        key="layers",
        title=f"Layer {worst} adds the most error of its own; after the last layer errors come "
        f"to {percent(last)} of the output",
        caption=(
            "Squared error over squared size of a block's output, against the floating-point "
            "model's: with every block before it quantized, and fed with what the floating-point "
            "model feeds it."
        ),
        panels=(panel("", draw),),
        keys=tuple(KINDS.values()),
        head=("layer", "with all before it", "alone"),
        rows=thin(rows),
        source="surface",
    )


def by_column(analysis: Analysis) -> Figure | None:
    """Relative error of the weights over their input channels."""
    table = analysis.table("columns")
    if table is None:
        return None
    grids = {
        str(linear): part.pivot("layer", "column_bin", "relative_error")
        for (linear,), part in table.groups("linear").items()
    }
    tops = {name: np.nanpercentile(grid, 90, axis=0) for name, (_, _, grid) in grids.items()}
    medians = {name: float(np.nanmedian(grid)) for name, (_, _, grid) in grids.items()}
    among = [0.0, *(float(value) for top in tops.values() for value in top)]
    panels, rows = [], []
    for linear, (_, bins, grid) in grids.items():
        middle = np.nanmedian(grid, axis=0)
        drawn = Curve(
            name="median",
            colour="after",
            x=bins,
            y=middle.tolist(),
            low=np.nanpercentile(grid, 10, axis=0).tolist(),
            high=tops[linear].tolist(),
        )
        draw = partial(
            curves,
            [drawn],
            x_label=f"input channels in order ({len(bins)} bins)",
            y_label="relative error of the weight",
            height=180,
            zero=True,
            among=among,
            place=lambda index: f"bin {index:.0f}",
            form=percent,
        )
        panels.append(panel(short_name(linear), draw, 4))
        values = medians[linear], float(np.nanmax(middle)), float(np.nanmin(middle))
        rows.append((short_name(linear), *(percent(value) for value in values)))
    worst = max(medians, key=lambda linear: medians[linear])
    return Figure(
        key="columns",
        title=f"Rounding hurts {linear_name(worst)} the most: {percent(medians[worst])} of its "
        "weights' size in the typical layer",
        caption=(
            "Relative error of the rounded weights over bins of input channels: the median over "
            "all layers, and a band that holds 80 % of them."
        ),
        panels=tuple(panels),
        keys=(Key(name="median of the layers", colour="after"),),
        head=("linear", "median", "worst bin", "best bin"),
        rows=tuple(rows),
        source="columns",
        across=4,
    )
