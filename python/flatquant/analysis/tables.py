"""The tables that an analysis writes: which columns they have and what they tell."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMAT = 1
"""Version of the folder: of `analysis.json` and of the columns below."""

Cell = str | int | float


@dataclass(frozen=True)
class Table:
    """Columns of a CSV file, and one sentence about it."""

    columns: tuple[str, ...]
    about: str


TABLES: dict[str, Table] = {
    "kurtosis": Table(
        ("layer", "linear", "of", "when", "kurtosis"),
        "E[(x-mean)^4]/variance^2 of a linear's weight and input, before and after the transform; "
        "3 is a normal distribution, more has outliers.",
    ),
    "similarity": Table(
        ("layer", "linear", "cosine", "sqnr_db"),
        "Output of a quantized linear against the floating-point one, its block fed with the "
        "floating-point model's hidden states.",
    ),
    "surface": Table(
        ("layer", "token", "mse", "mse_alone", "power"),
        "Squared error of a block's output by position in the window: with all blocks before it "
        "quantized, and alone; power is the mean square of the floating-point output.",
    ),
    "magnitudes": Table(
        ("layer", "site", "of", "when", "quantile", "magnitude"),
        "Sorted largest magnitudes of the channels of inputs and weights: a flat curve is easy to "
        "quantize.",
    ),
    "heatmap": Table(
        ("layer", "site", "when", "token_bin", "channel_bin", "magnitude"),
        "Largest input magnitude over bins of tokens and channels in one window, in the layer "
        "whose normalised inputs have the heaviest tails.",
    ),
    "columns": Table(
        ("layer", "linear", "column_bin", "relative_error"),
        "Relative error of the rounded weight over bins of input channels, in the basis in which "
        "it was rounded.",
    ),
    "clips": Table(
        ("layer", "where", "side", "ratio"),
        "Clip ratios of inputs, keys and values.",
    ),
    "ranges": Table(
        ("layer", "linear", "grid", "low", "high", "relative_error"),
        "Ends of the weight's grid over the row's largest magnitude: as stored, and the best ends "
        "of a symmetric and an asymmetric grid by squared error.",
    ),
    "conditions": Table(
        ("layer", "site", "factor", "condition"),
        "Condition numbers of the transforms; 1 is a rotation.",
    ),
    "sensitivity": Table(
        ("layer", "group", "bits", "kl"),
        "KL divergence of the next-token distribution when only this group of linears is rounded "
        "to nearest, or (group block) only this block is the quantized model's.",
    ),
    "fit": Table(
        ("block", "start", "end", "seconds", "notes"),
        "Calibration: squared error of every block before and after it was fitted.",
    ),
}
"""Name -> table; the file is the name with ".csv"."""


class Rows:
    """The rows of all tables, while they are collected."""

    def __init__(self) -> None:
        self._rows: dict[str, list[tuple[Cell, ...]]] = {}

    def add(self, table: str, *cells: Cell) -> None:
        """One row.

        Raises:
            ValueError: as many cells as the table has columns are needed.
        """
        columns = TABLES[table].columns
        if len(cells) != len(columns):
            raise ValueError(f"table {table!r}: {len(cells)} cells for columns {columns}")
        self._rows.setdefault(table, []).append(cells)

    def replace(self, table: str, rows: Iterable[tuple[Cell, ...]]) -> None:
        """Other rows instead of those collected so far."""
        self._rows.pop(table, None)
        for row in rows:
            self.add(table, *row)

    def __getitem__(self, table: str) -> list[tuple[Cell, ...]]:
        return self._rows.get(table, [])

    def write(self, folder: Path) -> dict[str, Mapping[str, Any]]:
        """Write every table that has rows; returns what `analysis.json` says of them.

        A file of an earlier analysis that this one has no rows for is removed.
        """
        listed: dict[str, Mapping[str, Any]] = {}
        for name, table in TABLES.items():
            file = folder / f"{name}.csv"
            rows = self[name]
            if not rows:
                file.unlink(missing_ok=True)
                continue
            with file.open("w", encoding="utf-8", newline="") as out:
                writer = csv.writer(out, lineterminator="\n")
                writer.writerow(table.columns)
                writer.writerows([_shown(cell) for cell in row] for row in rows)
            listed[name] = {"file": file.name, "rows": len(rows), "about": table.about}
        return listed


def _shown(cell: Cell) -> str:
    return f"{cell:.6g}" if isinstance(cell, float) else str(cell)
