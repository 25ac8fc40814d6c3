"""Published tables, to lay ours beside them. Their models and data are not ours: both are said.

Every value was copied from the paper named with it; none was measured here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flatquant.compare.run import Comparison, Row

NAN = math.nan


@dataclass(frozen=True, kw_only=True)
class PaperTable:
    """One table of a paper.

    Attributes:
        title: paper, table, metric.
        source: where the numbers stand.
        differs: what a reader must know before comparing.
        columns: models and texts.
        rows: our label -> (scheme, the paper's name, one value a column; NaN is its "NaN").
    """

    title: str
    source: str
    differs: str
    columns: tuple[str, ...]
    rows: Mapping[str, tuple[str, str, tuple[float | None, ...]]]

    def __post_init__(self) -> None:
        for label, (_, name, values) in self.rows.items():
            if len(values) != len(self.columns):
                raise ValueError(f"{self.title}: {name} ({label}) has {len(values)} values")


_FLATQUANT = "FlatQuant, arXiv 2410.09426"
_DIFFERS = (
    "Published: LLaMA models, 128 samples of 2048 tokens of WikiText-2's training text, sequence "
    "length 2048"
)
_MODELS = ("2-7B", "2-13B", "2-70B", "3-8B", "3-70B")

PAPERS: dict[str, PaperTable] = {
    "flatquant-table1": PaperTable(
        title="W4A4KV4, WikiText-2 perplexity",
        source=f"{_FLATQUANT}, table 1",
        differs=_DIFFERS,
        columns=_MODELS,
        rows={
            "fp": ("", "FP16", (5.47, 4.88, 3.32, 6.14, 2.86)),
            "smoothquant": ("W4A4KV4", "SmoothQuant", (83.12, 35.88, 26.01, 210.19, 9.60)),
            "omniquant": ("W4A4KV4", "OmniQuant", (14.74, 12.28, None, None, None)),
            "affinequant": ("W4A4KV4", "AffineQuant", (12.69, 11.45, None, None, None)),
            "quarot": ("W4A4KV4", "QuaRot-RTN", (8.56, 6.10, 4.14, 10.60, 55.44)),
            "spinquant": ("W4A4KV4", "SpinQuant-RTN", (6.14, 5.44, 3.82, 7.96, 7.58)),
            "flatquant": ("W4A4KV4", "FlatQuant-RTN", (5.79, 5.12, 3.55, 6.98, 3.78)),
            "quik": ("W4A4KV4", "QUIK-4B", (8.87, 7.78, 6.91, None, None)),
            "quarot-gptq": ("W4A4KV4", "QuaRot-GPTQ", (6.10, 5.40, 3.79, 8.16, 6.60)),
            "spinquant-gptq": ("W4A4KV4", "SpinQuant-GPTQ", (5.96, 5.24, 3.70, 7.39, 6.21)),
            "flatquant-gptq": ("W4A4KV4", "FlatQuant-GPTQ", (5.78, 5.11, 3.54, 6.90, 3.77)),
        },
    ),
    "flatquant-ablation": PaperTable(
        title="ablation of FlatQuant, LLaMA-3-8B, W4A4KV4",
        source=f"{_FLATQUANT}, table of the ablation",
        differs=_DIFFERS,
        columns=("WikiText-2", "C4", "QA %"),
        rows={
            "rtn": ("W4A4KV4", "nothing", (1266.60, 936.41, 30.99)),
            "flatquant-lt": ("W4A4KV4", "LT", (8.50, 13.51, 66.82)),
            "flatquant-lt-ps": ("W4A4KV4", "LT + PS", (7.95, 12.74, 67.08)),
            "flatquant-lt-lct": ("W4A4KV4", "LT + LCT", (7.11, 11.47, 70.72)),
            "flatquant": ("W4A4KV4", "LT + PS + LCT", (6.98, 11.13, 71.23)),
            "flatquant-ps": ("W4A4KV4", "PS", (NAN, NAN, NAN)),
        },
    ),
    "flatquant-weight-only": PaperTable(
        title="weight-only, LLaMA-3-8B",
        source=f"{_FLATQUANT}, table of weight-only quantization",
        differs=_DIFFERS,
        columns=("WikiText-2 W4A16", "C4 W4A16", "WikiText-2 W3A16", "C4 W3A16"),
        rows={
            "fp": ("", "FP16", (6.14, 9.45, 6.14, 9.45)),
            "rtn": ("W4A16", "RTN", (8.70, 14.00, 2200.0, 5600.0)),
            "gptq": ("W4A16", "GPTQ", (7.00, 11.80, 13.0, 45.9)),
            "awq": ("W4A16", "AWQ", (7.10, 10.10, 12.8, 16.8)),
            "quip": ("W4A16", "QuIP", (6.50, 11.10, 7.50, 11.30)),
            "flatquant": ("W4A16", "FlatQuant-RTN", (6.54, 10.17, 7.78, 12.64)),
            "flatquant-gptq": ("W4A16", "FlatQuant-GPTQ", (6.48, 10.28, 7.52, 12.91)),
        },
    ),
}
"""Name for `--paper` -> table. LLMC's tables (arXiv 2405.06001) are not among them: their values
could not be checked against the paper when this was written."""


def beside(table: PaperTable, rows: Sequence[Row], what: Comparison) -> str:
    """The published table with our perplexities as further columns, and how the two differ."""
    texts = list(what.texts)
    ours: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        ours.setdefault((row.job.label, row.job.scheme), []).append(row)
    head = ["method", "scheme", *(f"{name} (published)" for name in table.columns)]
    head += [f"{text} (ours)" for text in texts]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 2)]
    for label, (scheme, name, values) in table.rows.items():
        cells = [name, scheme or "-", *(_number(value) for value in values)]
        found = [row.values for row in ours.get((label, scheme), []) if row.error is None]
        for text in texts:
            scores = [value["texts"][text]["perplexity"] for value in found]
            cells.append(_number(sum(scores) / len(scores)) if scores else "")
        lines.append("| " + " | ".join(cells) + " |")
    protocol = f"{what.samples} samples of {what.seqlen} tokens"
    windows = "" if what.max_windows is None else f"the first {what.max_windows} "
    return "\n".join(
        [
            f"{table.title} ({table.source}).",
            "",
            *lines,
            "",
            f"They differ. {table.differs}. Ours: {what.model.name}, {protocol} of "
            f"{what.calibration.name if what.calibration else 'no text'}, {windows}windows of "
            f"{what.window} tokens. Only the order of the methods can be compared.",
        ]
    )


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return "NaN" if math.isnan(value) else f"{value:.4g}"


def paper(name: str) -> PaperTable:
    """A published table by name.

    Raises:
        ValueError: unknown name.
    """
    if name not in PAPERS:
        raise ValueError(f"paper {name!r} is unknown; known: {list(PAPERS)}")
    return PAPERS[name]
