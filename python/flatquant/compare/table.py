"""Rows of a comparison as text, CSV and JSON; seeds of one method become a mean and a spread."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from flatquant.compare.run import Row

Pick = Callable[[dict[str, Any]], float | None]


@dataclass(frozen=True)
class Column:
    """One quantity: its heading, its key in CSV, where it stands in a row, how it is printed."""

    heading: str
    key: str
    pick: Pick
    form: str = ".4g"


@dataclass(frozen=True)
class Line:
    """One method at one scheme: label, and a (mean, spread) a column; spread is max − min."""

    label: str
    scheme: str
    seeds: int
    cells: tuple[tuple[float, float] | None, ...]
    error: str | None = None


def columns(texts: Sequence[str]) -> list[Column]:
    """The quantities of a comparison that scores these texts."""
    result = []
    for text in texts:
        after = f" {text}" if len(texts) > 1 else ""
        for heading, key, form in (
            (f"ppl{after}", "perplexity", ".4g"),
            (f"KL{after}", "kl_mean", ".3f"),
            (f"KL p99{after}", "kl_p99", ".2f"),
            (f"top-1 %{after}", "top1", ".1%"),
        ):
            result.append(Column(heading, f"{text}.{key}", _text_value(text, key), form))
    for heading, key, scale, form in (
        ("bits/weight", "bits_per_weight", 1.0, ".2f"),
        ("calib. s", "calibration_seconds", 1.0, ".0f"),
        ("peak GiB", "calibration_memory", 2**30, ".2f"),
        ("prefill tok/s", "prefill", 1.0, ".0f"),
        ("decode tok/s", "decode", 1.0, ".1f"),
    ):
        result.append(Column(heading, key, _value(key, scale), form))
    return result


def _text_value(text: str, key: str) -> Pick:
    return lambda row: row.get("texts", {}).get(text, {}).get(key)


def _value(key: str, scale: float) -> Pick:
    return lambda row: None if row.get(key) is None else row[key] / scale


def lines(rows: Sequence[Row], shown: Sequence[Column]) -> list[Line]:
    """One line a method and scheme, in the order of the rows."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.job.label, row.job.scheme), []).append(row)
    result = []
    for (label, scheme), group in groups.items():
        errors = [row.error for row in group if row.error is not None]
        values = [row.values for row in group if row.error is None]
        cells = tuple(_spread([column.pick(value) for value in values]) for column in shown)
        result.append(Line(label, scheme, len(group), cells, errors[0] if errors else None))
    return result


def _spread(values: Sequence[float | None]) -> tuple[float, float] | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return statistics.fmean(known), max(known) - min(known)


def as_text(rows: Sequence[Row], texts: Sequence[str]) -> str:
    """A table in Markdown, numbers aligned to the right."""
    shown = [
        column
        for column in columns(texts)
        if any(column.pick(row.values) is not None for row in rows)
    ]
    table = [["method", "scheme", *(column.heading for column in shown)]]
    notes = []
    for line in lines(rows, shown):
        cells = [_cell(cell, column.form) for cell, column in zip(line.cells, shown, strict=True)]
        table.append([line.label, line.scheme or "-", *cells])
        if line.error is not None:
            notes.append(f"{line.label} {line.scheme} failed: {line.error}")
    simulated = sorted({row.job.name for row in rows if row.values.get("native") is False})
    if simulated:
        notes.append(f"simulated, not on integer kernels from end to end: {', '.join(simulated)}")
    return "\n".join([*_aligned(table, ["<", "<", *(">" for _ in shown)]), *notes])


def _aligned(table: list[list[str]], sides: list[str]) -> list[str]:
    widths = [max(len(row[i]) for row in table) for i in range(len(sides))]
    rule = [
        "-" * (width + 1) + ("-" if side == "<" else ":")
        for side, width in zip(sides, widths, strict=True)
    ]
    lines = [
        " | ".join(f"{c:{s}{w}}" for c, s, w in zip(row, sides, widths, strict=True))
        for row in table
    ]
    return [f"| {lines[0]} |", f"|{'|'.join(rule)}|", *(f"| {line} |" for line in lines[1:])]


def _cell(cell: tuple[float, float] | None, form: str) -> str:
    if cell is None:
        return ""
    mean, spread = cell
    shown = f"{mean:{form}}" if math.isfinite(mean) else str(mean)
    return shown if spread == 0 else f"{shown} ±{spread / 2:{form}}"


def as_csv(rows: Sequence[Row], texts: Sequence[str]) -> str:
    """One line a job, every quantity in full precision."""
    shown = columns(texts)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    keys = [column.key for column in shown]
    writer.writerow(["method", "weights", "scheme", "seed", *keys, "native", "error"])
    for row in rows:
        writer.writerow(
            [
                row.job.method,
                row.job.weights or "",
                row.job.scheme,
                row.job.seed,
                *(_exact(column.pick(row.values)) for column in shown),
                row.values.get("native", ""),
                row.error or "",
            ]
        )
    return out.getvalue()


def _exact(value: float | None) -> str:
    return "" if value is None else repr(value)


def as_json(rows: Sequence[Row], provenance: dict[str, Any]) -> str:
    """Rows as they were measured, and where they come from."""
    listed = [
        {"name": row.job.name, **row.values} | ({"error": row.error} if row.error else {})
        for row in rows
    ]
    return json.dumps({"provenance": provenance, "rows": listed}, indent=1)
