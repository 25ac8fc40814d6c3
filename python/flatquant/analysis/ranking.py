"""A `Ranking` of calibration texts as text, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict, fields
from typing import Any

from flatquant.analysis.texts import Ranking, TextFacts

_SHOWN = (
    ("name", "set", ""),
    ("divergence", "KL(eval‖set)", ".3f"),
    ("floor", "floor", ".3f"),
    ("coverage", "coverage", ".1%"),
    ("overlap", "overlap", ".1%"),
    ("logic", "shuffling costs", ".2f"),
    ("loss", "loss", ".2f"),
    ("samples", "samples", ""),
    ("tokens", "tokens", ""),
    ("median_length", "median length", ".0f"),
    ("short", "too short", ".0%"),
    ("special", "special ‰", ".1f"),
    ("unknown", "unknown", ".1%"),
)


def as_text(ranking: Ranking) -> str:
    """A table, the best candidate first, and the warnings."""
    shown = [
        column
        for column in _SHOWN
        if any(getattr(facts, column[0]) is not None for facts in ranking.candidates)
    ]
    table = [[heading for _, heading, _ in shown]]
    for facts in ranking.candidates:
        table.append([_cell(getattr(facts, name), form) for name, _, form in shown])
    widths = [max(len(row[i]) for row in table) for i in range(len(shown))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
    if ranking.evaluation_logic is not None:
        lines.append(
            f"{ranking.evaluation} (evaluation): loss {ranking.evaluation_loss:.2f}, "
            f"shuffling costs {ranking.evaluation_logic:.2f}"
        )
    for facts in ranking.candidates:
        lines += [f"warning: {facts.name}: {warning}" for warning in facts.warnings]
    clean = [facts.name for facts in ranking.candidates if not facts.warnings]
    lines.append(f"best: {clean[0]}" if clean else "best: none without a warning")
    return "\n".join(lines)


def _cell(value: Any, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def as_csv(ranking: Ranking) -> str:
    """One line a candidate, in full precision."""
    names = [field.name for field in fields(TextFacts)]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["rank", *names])
    for rank, facts in enumerate(ranking.candidates, 1):
        values = {**vars(facts), "warnings": "; ".join(facts.warnings)}
        writer.writerow([rank, *("" if values[n] is None else values[n] for n in names)])
    return out.getvalue()


def as_json(ranking: Ranking, provenance: dict[str, Any]) -> str:
    """Everything, and where it comes from."""
    return json.dumps({"provenance": provenance, **asdict(ranking)}, indent=1)
